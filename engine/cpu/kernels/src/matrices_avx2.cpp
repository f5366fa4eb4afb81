#include "matrices.inc.h"

namespace pagewire {

const Matrices& avx2_matrices() { return MATRICES; }

}  // namespace pagewire
