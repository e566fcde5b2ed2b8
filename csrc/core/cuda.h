// What kernel sources (.cu) use of CUDA, and nothing else of it. nvcc compiles them against <cuda_runtime.h>;
// a host compiler with DEEPEN_EMULATE compiles the same sources against tests/emulator/emulator.h, which
// gives the same names a fiber for each CUDA thread.
//
//   DEEPEN_LAUNCH(kernel, grid, block, dynamic_shared_bytes, stream, args...)
//     launches and checks for a launch error (CudaError); a template instance goes in parentheses. The kernel
//     may have all the shared memory that a block can have
//   DEEPEN_SHARED(type, name)                the block's dynamic shared memory as `type* name`, 16-byte
//   aligned,
//                                            one per kernel
//   DEEPEN_STATIC_SHARED(type, name, count)  `__shared__ type name[count]`
//   DEEPEN_CUDA_CHECK(call)                  throws CudaError with the place, the call and CUDA's own text
//   DeviceGuard                              makes a device current, and the previous one again at its end
//   max_shared_bytes(device)                 the most shared memory a block may have there
//   multiprocessors(device)
#pragma once

#include <stdexcept>
#include <string>

#ifdef DEEPEN_EMULATE
#include "emulator.h"
#else
#include <cuda_runtime.h>
#endif

namespace deepen {

struct CudaError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Clears the runtime's last error.
[[noreturn]] void throw_cuda_error(const char* file, int line, const char* call, cudaError_t error);

class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = -1;
  bool switched_ = false;
};

// Asked of the runtime once for each device.
int max_shared_bytes(int device);
int multiprocessors(int device);

// Before the first launch of a kernel on the current device: loads it and allows it the most shared memory
// there is, not what one launch needs, because two threads that launch it with different sizes would take
// each other's room away. Later calls find it done.
void prepare_kernel(const void* kernel, const char* file, int line);

}  // namespace deepen

#define DEEPEN_CUDA_CHECK(call)                                                                           \
  do {                                                                                                    \
    const cudaError_t deepen_error = (call);                                                              \
    if (deepen_error != cudaSuccess) ::deepen::throw_cuda_error(__FILE__, __LINE__, #call, deepen_error); \
  } while (0)

#define DEEPEN_LAUNCH(kernel, grid, block, dynamic_shared_bytes, stream, ...)                               \
  do {                                                                                                      \
    auto* const deepen_kernel = kernel;                                                                     \
    ::deepen::prepare_kernel(reinterpret_cast<const void*>(deepen_kernel), __FILE__, __LINE__);             \
    DEEPEN_START(deepen_kernel, #kernel, (grid), (block), (dynamic_shared_bytes), (stream), ##__VA_ARGS__); \
    const cudaError_t deepen_launched = cudaGetLastError();                                                 \
    if (deepen_launched != cudaSuccess) {                                                                   \
      ::deepen::throw_cuda_error(__FILE__, __LINE__, "launch of " #kernel, deepen_launched);                \
    }                                                                                                       \
  } while (0)

#ifndef DEEPEN_EMULATE

#define DEEPEN_START(kernel, name, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)

#define DEEPEN_SHARED(type, name)                                        \
  extern __shared__ __align__(16) unsigned char deepen_dynamic_shared[]; \
  type* const name = reinterpret_cast<type*>(deepen_dynamic_shared)

#define DEEPEN_STATIC_SHARED(type, name, count) __shared__ type name[count]

namespace deepen {
// Fetches the 128 bytes around an address into the L2 cache; nothing waits for it.
__device__ __forceinline__ void prefetch_l2(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}
}  // namespace deepen

#endif
