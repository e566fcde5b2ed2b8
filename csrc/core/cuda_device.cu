#include "core/cuda_device.h"

#include <map>
#include <mutex>
#include <set>
#include <string>
#include <utility>

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

void* allocate_on_device(int device, size_t bytes) {
  const DeviceGuard guard(device);
  void* start = nullptr;
  DEEPEN_CUDA_CHECK(cudaMalloc(&start, bytes));
  return start;
}

void copy_to_device(int device, void* to, const void* from, size_t bytes) {
  const DeviceGuard guard(device);
  DEEPEN_CUDA_CHECK(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice));
  // From memory that is not pinned it may return while the bytes are on their way, and a stream that does not
  // wait for the default one would read what is not there yet.
  DEEPEN_CUDA_CHECK(cudaStreamSynchronize(nullptr));
}

void free_on_device(int device, void* start) noexcept {
  try {
    const DeviceGuard guard(device);
    // Nobody hears of it: without this the next launch that succeeds would find the error and throw it.
    if (cudaFree(start) != cudaSuccess) cudaGetLastError();
  } catch (const CudaError&) {  // a device that is gone has freed it
  }
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

// The device was current before, so this fails only after an error that the next call reports. In a thread
// that has used no device, the one before is 0, and going back makes a context there if the process has none.
// torch would stay and remember for itself which device is meant; what it remembers cannot be set from here,
// and the thread would find another device current than it left.
DeviceGuard::~DeviceGuard() {
  if (switched_ && cudaSetDevice(previous_) != cudaSuccess) cudaGetLastError();
}

// What was asked of the runtime once and does not change.
struct Known {
  std::mutex mutex;
  std::map<std::pair<int, int>, int> attributes;   // by attribute and device
  std::set<std::pair<const void*, int>> prepared;  // kernels by device
};
static Known known;

static int attribute(cudaDeviceAttr which, int device) {
  const std::lock_guard<std::mutex> lock(known.mutex);
  const auto found = known.attributes.find({which, device});
  if (found != known.attributes.end()) return found->second;
  int value = 0;
  DEEPEN_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device));
  return known.attributes[{which, device}] = value;
}

int max_shared_bytes(int device) { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device); }
int multiprocessors(int device) { return attribute(cudaDevAttrMultiProcessorCount, device); }

#ifdef DEEPEN_EMULATE
void emulator::forget_devices() {
  const std::lock_guard<std::mutex> lock(known.mutex);
  known.attributes.clear();
  known.prepared.clear();
}
#endif

// A capture of this thread forbids what may allocate, unless it is relaxed; loading a kernel may.
class RelaxedCapture {
 public:
  RelaxedCapture() { DEEPEN_CUDA_CHECK(cudaThreadExchangeStreamCaptureMode(&mode_)); }
  ~RelaxedCapture() {
    if (cudaThreadExchangeStreamCaptureMode(&mode_) != cudaSuccess) cudaGetLastError();
  }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;  // then the thread's own
};

// The runtime loads a kernel when it is first used. cudaFuncGetAttributes does it without a launch: a stream
// that captures gets the launch alone. Drivers load during a capture since CUDA 12.3. The lock is held until
// the kernel is ready: a second thread must not launch it before.
void prepare_kernel(const void* kernel, const char* file, int line) {
  const auto check = [&](cudaError_t error, const char* call) {
    if (error != cudaSuccess) throw_cuda_error(file, line, call, error);
  };
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  const int room = max_shared_bytes(device);
  const std::lock_guard<std::mutex> lock(known.mutex);
  if (known.prepared.count({kernel, device}) != 0) return;
  const RelaxedCapture relaxed;
  cudaFuncAttributes attributes{};
  check(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             room - int(attributes.sharedSizeBytes)),
        "cudaFuncSetAttribute");
  known.prepared.insert({kernel, device});
}

}  // namespace deepen
