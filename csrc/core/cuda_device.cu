#include "core/cuda_device.h"

#include "core/cuda.h"

namespace deepen {

bool cuda_compiled() { return true; }

int cuda_device_count() {
  int count = 0;
  // A machine without a driver is no error here: the caller asks precisely to find that out.
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();
  return 0;
}

void throw_cuda_error(const char* file, int line, const char* call, cudaError_t error) {
  // It has been told: without this the next launch that succeeds would find it and throw it again.
  cudaGetLastError();
  throw CudaError(std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error) + ", from " + call +
                  " [" + file + ":" + std::to_string(line) + "]");
}

DeviceGuard::DeviceGuard(int device) {
  DEEPEN_CUDA_CHECK(cudaGetDevice(&previous_));
  if (previous_ == device) return;
  DEEPEN_CUDA_CHECK(cudaSetDevice(device));
  switched_ = true;
}

// The device was current before, so this fails only after an error that the next call reports.
DeviceGuard::~DeviceGuard() {
  if (switched_ && cudaSetDevice(previous_) != cudaSuccess) cudaGetLastError();
}

static int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  DEEPEN_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

int max_shared_bytes(int device) { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device); }
int multiprocessors(int device) { return attribute(cudaDevAttrMultiProcessorCount, device); }

#ifndef DEEPEN_EMULATE
void allow_most_shared(const void* kernel, const char* file, int line) {
  const auto check = [&](cudaError_t error, const char* call) {
    if (error != cudaSuccess) throw_cuda_error(file, line, call, error);
  };
  int device = 0;
  cudaFuncAttributes attributes{};
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
  const int most = max_shared_bytes(device) - int(attributes.sharedSizeBytes);
  if (attributes.maxDynamicSharedSizeBytes == most) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most),
        "cudaFuncSetAttribute");
}
#endif

}  // namespace deepen
