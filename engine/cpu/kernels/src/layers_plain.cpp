#include "layers.inc.h"

namespace pagewire {

const Layers& plain_layers() { return LAYERS; }

}  // namespace pagewire
