#include "products_avx512.inc.h"

namespace pagewire {

const Instructions& avx512_instructions() {
    static const Instructions instructions = {
        "avx512",
        avx2_instructions().quantize,
        {multiply<Q4>, multiply<Q4M>, multiply<Q5>, multiply<Q5M>, multiply<Q8>, multiply<Q4K>, multiply<Q5K>,
         multiply<Q6K>, avx512_matrices().bf16, avx512_matrices().f16,
         multiply<I4>, multiply<I8>},
        avx512_layers(),
    };
    return instructions;
}

}  // namespace pagewire
