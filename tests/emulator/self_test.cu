// Small kernels with results worked out by hand: `self_test CASE` exits with 0 if they come out, on the
// emulator or on a GPU. Cases that begin with "bad" are for the emulator alone: it must report them.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "core/cuda.h"
#include "core/cuda_device.h"

extern "C" void deepen_emulator_set_seed(uint64_t seed);
extern "C" void deepen_emulator_set_devices(int count);

namespace {

constexpr unsigned kAll = 0xffffffffu;

template <class T>
struct Managed {
  T* data = nullptr;
  explicit Managed(size_t count) {
    DEEPEN_CUDA_CHECK(cudaMallocManaged(reinterpret_cast<void**>(&data), count * sizeof(T)));
    std::memset(static_cast<void*>(data), 0, count * sizeof(T));
  }
  ~Managed() { cudaFree(data); }
  T& operator[](size_t i) { return data[i]; }
};

void expect(bool right, const char* what) {
  if (right) return;
  std::fprintf(stderr, "wrong: %s\n", what);
  std::exit(1);
}

// --- Warp collectives
// ------------------------------------------------------------------------------------------------

struct Lanes {
  int from_3, up, down, exchanged, half;
  unsigned odd, any, all, same_third, same_wide, low, largest, smallest;
  double wide;
};

__global__ void collectives(Lanes* out) {
  const int lane = int(threadIdx.x % 32);
  Lanes& mine = out[threadIdx.x];
  mine.from_3 = __shfl_sync(kAll, lane * 10, 3);
  mine.up = __shfl_up_sync(kAll, lane, 4);
  mine.down = __shfl_down_sync(kAll, lane, 4);
  mine.exchanged = __shfl_xor_sync(kAll, lane, 1);
  mine.half = __shfl_down_sync(kAll, lane, 12, 16);
  mine.wide = __shfl_xor_sync(kAll, 0.5 + lane, 16);
  mine.odd = __ballot_sync(kAll, lane & 1);
  mine.any = unsigned(__any_sync(kAll, lane == 7));
  mine.all = unsigned(__all_sync(kAll, lane < 31));
  mine.same_third = __match_any_sync(kAll, lane % 3);
  mine.same_wide = __match_any_sync(kAll, (unsigned long long)(lane / 16) << 40);
  mine.largest = __reduce_max_sync(kAll, threadIdx.x == 37 ? 0x80000007u : unsigned(lane));
  mine.smallest = __reduce_min_sync(kAll, unsigned(lane ^ 21) + 3u);
  mine.low = 0;
  if (lane < 5) mine.low = __ballot_sync(0x1fu, lane != 2);
  __syncwarp();
}

void test_collectives() {
  Managed<Lanes> out(64);
  DEEPEN_LAUNCH(collectives, 1, 64, 0, nullptr, out.data);
  DEEPEN_CUDA_CHECK(cudaDeviceSynchronize());
  for (int thread = 0; thread < 64; ++thread) {
    const int lane = thread % 32;
    const Lanes& mine = out[size_t(thread)];
    expect(mine.from_3 == 30, "shfl");
    expect(mine.up == (lane < 4 ? lane : lane - 4), "shfl_up");
    expect(mine.down == (lane > 27 ? lane : lane + 4), "shfl_down");
    expect(mine.exchanged == (lane ^ 1), "shfl_xor");
    expect(mine.half == (lane % 16 >= 4 ? lane : lane + 12), "shfl_down of width 16");
    expect(mine.wide == 0.5 + (lane ^ 16), "shfl_xor of a double");
    expect(mine.odd == 0xaaaaaaaau, "ballot");
    expect(mine.any == 1 && mine.all == 0, "any, all");
    unsigned thirds = 0;
    for (int other = lane % 3; other < 32; other += 3) thirds |= 1u << other;
    expect(mine.same_third == thirds, "match_any");
    expect(mine.same_wide == (lane < 16 ? 0x0000ffffu : 0xffff0000u), "match_any of 8 bytes");
    expect(mine.largest == (thread < 32 ? 31u : 0x80000007u), "reduce_max");
    expect(mine.smallest == 3u, "reduce_min");
    expect(mine.low == (lane < 5 ? 0x1bu : 0u), "ballot of some lanes");
  }
}

// --- Atomics
// ---------------------------------------------------------------------------------------------------------

struct Totals {
  unsigned sum, largest, smallest, bits, ticket, taken;
  unsigned long long wide;
  int signed_smallest;
};

__global__ void atomics(Totals* out) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  atomicAdd(&out->sum, i);
  atomicAdd(&out->wide, 1ull << 33);
  atomicMax(&out->largest, i);
  atomicMin(&out->smallest, i + 5);
  atomicMin(&out->signed_smallest, int(i) - 100);
  atomicOr(&out->bits, 1u << (i % 32));
  atomicInc(&out->ticket, 99);  // wraps: 0 .. 99
  if (atomicCAS(&out->taken, 0, i + 1) == 0) atomicAdd(&out->taken, 1000);
}

void test_atomics() {
  Managed<Totals> out(1);
  out[0].smallest = 77;
  DEEPEN_LAUNCH(atomics, 3, 64, 0, nullptr, out.data);
  DEEPEN_CUDA_CHECK(cudaDeviceSynchronize());
  const Totals& total = out[0];
  expect(total.sum == 191 * 192 / 2, "atomicAdd");
  expect(total.wide == 192ull << 33, "atomicAdd of 8 bytes");
  expect(total.largest == 191 && total.smallest == 5 && total.signed_smallest == -100,
         "atomicMax, atomicMin");
  expect(total.bits == kAll, "atomicOr");
  expect(total.ticket == 92, "atomicInc");
  expect(total.taken > 1000 && total.taken <= 1192, "atomicCAS");
}

// --- Shared memory, blocks, intrinsics
// -------------------------------------------------------------------------------

template <int kTimes>
__global__ void reverse(const float* in, float* out) {
  DEEPEN_SHARED(float, buffer);
  DEEPEN_STATIC_SHARED(int, offset, 1);
  if (threadIdx.x == 0) offset[0] = int(blockIdx.y * gridDim.x + blockIdx.x) * int(blockDim.x);
  __syncthreads();
  buffer[threadIdx.x] = in[offset[0] + int(threadIdx.x)];
  __syncthreads();
  out[offset[0] + int(threadIdx.x)] = kTimes * buffer[blockDim.x - 1 - threadIdx.x];
}

void test_shared() {
  constexpr int kBlock = 96, kBlocks = 6;
  Managed<float> in(kBlock * kBlocks), out(kBlock * kBlocks);
  for (int i = 0; i < kBlock * kBlocks; ++i) in[size_t(i)] = float(i);
  DEEPEN_LAUNCH((reverse<3>), dim3(2, 3), kBlock, kBlock * sizeof(float), nullptr, in.data, out.data);
  DEEPEN_CUDA_CHECK(cudaDeviceSynchronize());
  for (int i = 0; i < kBlock * kBlocks; ++i) {
    expect(out[size_t(i)] == float(3 * (i / kBlock * kBlock + kBlock - 1 - i % kBlock)), "reversed blocks");
  }
}

__global__ void intrinsics(unsigned* out) {
  out[0] = unsigned(__popc(0xf0f0u));
  out[1] = unsigned(__ffs(0x50));
  out[2] = unsigned(__clz(0x10000));
  out[3] = __brev(0x3u);
  out[4] = __float_as_uint(-2.0f);
  out[5] = unsigned(__uint_as_float(0x40400000u));
  out[6] = unsigned(__clz(0)) + unsigned(__ffs(0));
  out[7] = unsigned(min(7, 3)) + unsigned(max(7u, 3u));
}

void test_intrinsics() {
  Managed<unsigned> out(8);
  DEEPEN_LAUNCH(intrinsics, 1, 1, 0, nullptr, out.data);
  DEEPEN_CUDA_CHECK(cudaDeviceSynchronize());
  const unsigned want[8] = {8, 5, 15, 0xc0000000u, 0xc0000000u, 3, 32, 10};
  for (size_t i = 0; i < 8; ++i) expect(out[i] == want[i], "intrinsic");
}

void test_launch_errors() {
  const auto refused = [](dim3 grid, dim3 block, size_t shared) {
    try {
      DEEPEN_LAUNCH((reverse<1>), grid, block, shared, nullptr, nullptr, nullptr);
    } catch (const deepen::CudaError& error) {
      const std::string text = error.what();
      return text.find("cudaError") != std::string::npos && text.find("self_test.cu:") != std::string::npos;
    }
    return false;
  };
  expect(refused(1, 1025, 0), "more than 1024 threads");
  expect(refused(dim3(1, 65536), 32, 0), "too high a grid");
  expect(refused(0, 32, 0), "an empty grid");
  expect(refused(1, 32, size_t(1) << 20), "more shared memory than there is");
}

void test_much_shared_memory() {
  constexpr size_t kMuch = 64 * 1024;
  Managed<float> in(32), out(32);
  in[0] = 1.0f;
  const auto kernel = reverse<5>;
  DEEPEN_START(kernel, "reverse<5>", 1, 32, kMuch, nullptr, in.data, out.data);
  expect(cudaGetLastError() == cudaErrorInvalidValue, "a kernel had more than it was allowed");
  DEEPEN_LAUNCH((reverse<5>), 1, 32, kMuch, nullptr, in.data, out.data);
  DEEPEN_CUDA_CHECK(cudaDeviceSynchronize());
  expect(out[31] == 5.0f, "reversed in much shared memory");
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  DEEPEN_CUDA_CHECK(cudaThreadExchangeStreamCaptureMode(&mode));
  expect(mode == cudaStreamCaptureModeGlobal, "the thread's capture mode was left another");
  DEEPEN_CUDA_CHECK(cudaThreadExchangeStreamCaptureMode(&mode));
}

template <class Call>
bool throws(Call call) {
  try {
    call();
  } catch (const deepen::CudaError&) {
    return true;
  }
  return false;
}

// What failed is told once: the launch after it succeeds.
void test_failed_calls() {
  const auto nothing_left = [](const char* what) {
    expect(cudaPeekAtLastError() == cudaSuccess, what);
    test_intrinsics();
  };
  int value = 0;
  expect(
      throws([&] { DEEPEN_CUDA_CHECK(cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, 999)); }),
      "an attribute of no device");
  nothing_left("a failed call left its error");
  expect(throws([] { DEEPEN_LAUNCH((reverse<1>), 0, 32, 0, nullptr, nullptr, nullptr); }), "an empty grid");
  nothing_left("a failed launch left its error");
  expect(throws([] { const deepen::DeviceGuard guard(999); }), "a guard of no device");
  nothing_left("a failed guard left its error");
  deepen::free_on_device(0, &value);
  nothing_left("freeing what is not the device's left an error");
#ifdef DEEPEN_EMULATE
  deepen_emulator_set_devices(0);
  expect(deepen::cuda_device_count() == 0, "devices were counted where there are none");
  deepen_emulator_set_devices(2);
  nothing_left("counting no devices left an error");
  DEEPEN_CUDA_CHECK(cudaSetDevice(1));
  {
    const deepen::DeviceGuard guard(0);
    deepen_emulator_set_devices(1);
  }
  deepen_emulator_set_devices(2);
  nothing_left("a guard that cannot go back left an error");
#endif
}

// --- What the emulator must report
// -----------------------------------------------------------------------------------

#ifdef DEEPEN_EMULATE

__global__ void some_skip_the_barrier(int kind) {
  if (kind == 0 && threadIdx.x >= 40) return;
  if (kind == 1 && threadIdx.x == 5) __syncwarp();
  if (kind == 2 && threadIdx.x < 16) __syncthreads();
  __syncthreads();
}

__global__ void reads_before_it_writes(float* out) {
  DEEPEN_SHARED(float, buffer);
  DEEPEN_STATIC_SHARED(float, more, 4);
  out[threadIdx.x] = threadIdx.x == 0 ? buffer[3] : more[3];
}

__global__ void no_barrier_between(float* out) {
  DEEPEN_SHARED(float, buffer);
  buffer[threadIdx.x] = 1.0f;
  out[threadIdx.x] = buffer[blockDim.x - 1 - threadIdx.x];
}

__global__ void writes_past_the_end(int at) {
  DEEPEN_SHARED(char, buffer);
  buffer[at + int(threadIdx.x)] = 1;
}

__global__ void writes_past_the_static_end(int at) {
  DEEPEN_STATIC_SHARED(int, buffer, 5);
  int* const pointer = buffer;  // the array's own bounds are not known through it
  pointer[at] = 1;
}

__global__ void lanes_disagree() {
  if (threadIdx.x < 16) {
    __ballot_sync(kAll, 1);
  } else {
    __any_sync(kAll, 1);
  }
}

__global__ void lane_outside_its_mask() { __ballot_sync(0xffffu, 1); }

__global__ void misaligned(const float* in, float* out) {
  *out = reinterpret_cast<const float4*>(in + threadIdx.x + 1)->x;
}

void report(const std::string& name) {
  Managed<float> out(64);
  if (name == "bad-stale-error") {
    expect(cudaSetDevice(999) != cudaSuccess, "a device that is not there");  // and nobody clears it
    expect(cudaPeekAtLastError() == cudaErrorInvalidDevice, "the last error is not the one");
    DEEPEN_CUDA_CHECK(cudaSetDevice(0));  // what succeeds does not either
    DEEPEN_LAUNCH(intrinsics, 1, 1, 0, nullptr, reinterpret_cast<unsigned*>(out.data));
  }
  if (name == "bad-exit") DEEPEN_LAUNCH(some_skip_the_barrier, 1, 64, 0, nullptr, 0);
  if (name == "bad-warp") DEEPEN_LAUNCH(some_skip_the_barrier, 1, 64, 0, nullptr, 1);
  if (name == "bad-two-barriers") DEEPEN_LAUNCH(some_skip_the_barrier, 1, 64, 0, nullptr, 2);
  if (name == "bad-lanes") DEEPEN_LAUNCH(lanes_disagree, 1, 32, 0, nullptr);
  if (name == "bad-mask") DEEPEN_LAUNCH(lane_outside_its_mask, 1, 32, 0, nullptr);
  if (name == "bad-bounds") DEEPEN_LAUNCH(writes_past_the_end, 1, 32, 33, nullptr, 2);
  if (name == "bad-static-bounds") DEEPEN_LAUNCH(writes_past_the_static_end, 1, 1, 0, nullptr, 5);
  if (name == "bad-alignment") DEEPEN_LAUNCH(misaligned, 1, 1, 0, nullptr, out.data, out.data + 32);
  if (name == "bad-uninitialised") {
    DEEPEN_LAUNCH(reads_before_it_writes, 1, 2, 16, nullptr, out.data);
    expect(__float_as_uint(out[0]) != 0x7fe1deadu, "read 0x7fe1dead from dynamic shared memory");
  }
  if (name == "bad-static-uninitialised") {
    DEEPEN_LAUNCH(reads_before_it_writes, 1, 2, 16, nullptr, out.data);
    expect(__float_as_uint(out[1]) != 0x7fe1deadu, "read 0x7fe1dead from static shared memory");
  }
  if (name == "bad-missing-barrier") {
    DEEPEN_LAUNCH(no_barrier_between, 1, 64, 64 * sizeof(float), nullptr, out.data);
    for (size_t i = 0; i < 64; ++i) expect(out[i] == 1.0f, "a thread read what another had not written yet");
  }
}

// A failed launch leaves nothing behind that the next one trips over.
void test_after_an_error() {
  for (int i = 0; i < 3; ++i) {
    try {
      DEEPEN_LAUNCH(some_skip_the_barrier, 1, 64, 0, nullptr, i);
      expect(false, "a divergent barrier was not reported");
    } catch (const deepen::emulator::Error&) {
    }
    test_shared();
  }
}

#endif

}  // namespace

int main(int count, char** arguments) {
  const std::string name = count > 1 ? arguments[1] : "all";
  try {
#ifdef DEEPEN_EMULATE
    if (count > 2) deepen_emulator_set_seed(std::strtoull(arguments[2], nullptr, 10));
    if (name.rfind("bad-", 0) == 0) {
      report(name);
      return 0;
    }
    if (name == "all" || name == "after-an-error") test_after_an_error();
#endif
    if (name == "all" || name == "collectives") test_collectives();
    if (name == "all" || name == "atomics") test_atomics();
    if (name == "all" || name == "shared") test_shared();
    if (name == "all" || name == "intrinsics") test_intrinsics();
    if (name == "all" || name == "launch-errors") test_launch_errors();
    if (name == "all" || name == "much-shared-memory") test_much_shared_memory();
    if (name == "all" || name == "failed-calls") test_failed_calls();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  }
  return 0;
}
