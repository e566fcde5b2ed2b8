// Whether this build has its CUDA part, and whether the machine has a device for it.
#pragma once

namespace deepen {

bool cuda_compiled();
int cuda_device_count();  // 0 without a driver or a device

}  // namespace deepen
