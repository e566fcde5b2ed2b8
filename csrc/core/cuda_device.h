// Whether this build has its CUDA part, whether the machine has a device for it, and a device's memory.
#pragma once

#include <cstddef>

namespace deepen {

bool cuda_compiled();
int cuda_device_count();  // 0 without a driver or a device

// For programs without a framework that allocates (csrc/embed). Each throws CudaError.
void* allocate_on_device(int device, size_t bytes);
void copy_to_device(int device, void* to, const void* from, size_t bytes);  // waits until it is there
void free_on_device(int device, void* start) noexcept;

}  // namespace deepen
