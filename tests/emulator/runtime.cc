// The CUDA runtime's calls under the emulator.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "internal.h"

using namespace deepen::emulator;

static thread_local cudaError_t last_error = cudaSuccess;

cudaError_t deepen::emulator::failed(cudaError_t error) { return last_error = error; }

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
cudaError_t cudaPeekAtLastError() { return last_error; }

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    case cudaErrorNoDevice: return "cudaErrorNoDevice";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
  }
  return "unknown";
}
const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorNoDevice: return "no CUDA-capable device is detected";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
  }
  return "unknown";
}

static std::atomic<int64_t> questions{0};  // for attributes, of devices and of kernels

static bool exists(int device) { return device >= 0 && device < settings.devices; }

cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  if (!exists(device)) return failed(cudaErrorInvalidDevice);
  current_device = device;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* count) {
  *count = settings.devices;
  return settings.devices > 0 ? cudaSuccess : failed(cudaErrorNoDevice);
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  ++questions;
  if (!exists(device)) return failed(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = settings.multiprocessors; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = int(settings.max_shared_bytes); return cudaSuccess;
  }
  return failed(cudaErrorInvalidValue);
}

constexpr int kAllowedByDefault = 48 * 1024;
static std::mutex allowed_mutex;
static std::map<std::pair<const void*, int>, int> allowed;  // by kernel and device

size_t deepen::emulator::allowed_shared_bytes(const void* kernel, int device) {
  const std::lock_guard<std::mutex> lock(allowed_mutex);
  const auto found = allowed.find({kernel, device});
  return size_t(found == allowed.end() ? kAllowedByDefault : found->second);
}
void deepen::emulator::forget_allowed() {
  const std::lock_guard<std::mutex> lock(allowed_mutex);
  allowed.clear();
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
  ++questions;
  *attributes = {0, int(allowed_shared_bytes(kernel, current_device))};
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  if (value < 0 || size_t(value) > settings.max_shared_bytes) return failed(cudaErrorInvalidValue);
  const std::lock_guard<std::mutex> lock(allowed_mutex);
  allowed[{kernel, current_device}] = value;
  return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  static thread_local cudaStreamCaptureMode current = cudaStreamCaptureModeGlobal;
  std::swap(current, *mode);
  return cudaSuccess;
}

// A copy from memory that is not pinned may return while its bytes are on their way. They arrive before the
// default stream's next work. Any other stream here is one that does not wait for the default stream.
struct Copy {
  void* to;
  std::string bytes;
};
static std::mutex copies_mutex;
static std::vector<Copy> copies;

void deepen::emulator::end_copies() {
  const std::lock_guard<std::mutex> lock(copies_mutex);
  for (const Copy& copy : copies) std::memcpy(copy.to, copy.bytes.data(), copy.bytes.size());
  copies.clear();
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  const std::lock_guard<std::mutex> lock(copies_mutex);
  copies.push_back({to, {static_cast<const char*>(from), bytes}});
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (stream == nullptr) end_copies();
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
  end_copies();
  return cudaSuccess;
}

static std::mutex allocated_mutex;
static std::set<void*> allocated;

cudaError_t cudaMalloc(void** pointer, size_t bytes) { return cudaMallocManaged(pointer, bytes); }
cudaError_t cudaMallocManaged(void** pointer, size_t bytes) {
  *pointer = poisoned(bytes);
  poison(static_cast<char*>(*pointer), bytes);
  const std::lock_guard<std::mutex> lock(allocated_mutex);
  allocated.insert(*pointer);
  return cudaSuccess;
}
cudaError_t cudaFree(void* pointer) {
  end_copies();  // it waits for the device
  const std::lock_guard<std::mutex> lock(allocated_mutex);
  if (pointer != nullptr && allocated.erase(pointer) == 0) return failed(cudaErrorInvalidValue);
  std::free(pointer);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t stream) {
  if (stream == nullptr) end_copies();
  std::memset(pointer, value, bytes);
  return cudaSuccess;
}

DEEPEN_EXPORT int64_t deepen_emulator_questions() { return questions; }
