#include "layers.inc.h"

namespace pagewire {

const Layers& avx2_layers() { return LAYERS; }

}  // namespace pagewire
