#include "products_avx2.inc.h"

namespace pagewire {

const Instructions& avx2_instructions() {
    static const Instructions instructions = {
        "avx2",
        quantize,
        {multiply<Q4>, multiply<Q4M>, multiply<Q5>, multiply<Q5M>, multiply<Q8>, multiply<Q4K>, multiply<Q5K>,
         multiply<Q6K>, avx2_matrices().bf16, avx2_matrices().f16,
         multiply<I4>, multiply<I8>},
        avx2_layers(),
    };
    return instructions;
}

}  // namespace pagewire
