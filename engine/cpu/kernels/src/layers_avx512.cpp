#include "layers.inc.h"

namespace pagewire {

const Layers& avx512_layers() { return LAYERS; }

}  // namespace pagewire
