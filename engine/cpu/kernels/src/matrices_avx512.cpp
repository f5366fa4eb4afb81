#include "matrices.inc.h"

namespace pagewire {

const Matrices& avx512_matrices() { return MATRICES; }

}  // namespace pagewire
