#include "matrices.inc.h"

namespace pagewire {

const Matrices& plain_matrices() { return MATRICES; }

}  // namespace pagewire
