#include "core/cuda_device.h"

namespace deepen {

bool cuda_compiled() { return false; }
int cuda_device_count() { return 0; }

}  // namespace deepen
