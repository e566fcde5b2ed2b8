// Accesses to shared memory whose bank conflicts are known: prints what the emulator counted. A kernel has
// one access that counts, at the line that says so.
#include <cstdio>

#include "core/cuda.h"

extern "C" const char* deepen_emulator_bank_report();

namespace {

constexpr size_t kBytes = 32 * 16 * sizeof(float);

__global__ void strided(int stride) {
  DEEPEN_SHARED(float, buffer);
  buffer[threadIdx.x * unsigned(stride)] = 1.0f;  // counted
}
__global__ void eight_ways(int stride) {
  DEEPEN_SHARED(float, buffer);
  buffer[threadIdx.x * unsigned(stride)] = 1.0f;  // counted
}
__global__ void odd_stride(int stride) {
  DEEPEN_STATIC_SHARED(float, buffer, 32 * 9);
  buffer[threadIdx.x * unsigned(stride)] = 1.0f;  // counted
}
__global__ void broadcast(float* out) {
  DEEPEN_SHARED(float, buffer);
  const float value = buffer[7];  // counted
  if (value == 0.0f) *out = value;
}
__global__ void sixteen_bytes(float* out) {
  DEEPEN_SHARED(float4, buffer);
  const float4 value = buffer[threadIdx.x];  // counted
  if (value.x == 0.0f) *out = value.x;
}
__global__ void eight_bytes(float* out) {
  DEEPEN_SHARED(float2, buffer);
  const float2 value = buffer[threadIdx.x * 2];  // counted
  if (value.x == 0.0f) *out = value.x;
}
__global__ void atomics_at_four_words() {
  DEEPEN_STATIC_SHARED(int, buffer, 4 * 32);
  atomicAdd(&buffer[threadIdx.x % 4 * 32], 1);  // counted
}
// What the lanes do in one turn goes together, though one lane runs after the other.
__global__ void in_a_loop(int stride) {
  DEEPEN_SHARED(float, buffer);
  for (int i = 0; i < stride; ++i) {
    buffer[int(threadIdx.x) * stride + i] = 1.0f;  // counted
  }
}
// Between the two halves' accesses all lanes meet.
__global__ void apart() {
  DEEPEN_SHARED(float, buffer);
  for (unsigned half = 0; half < 2; ++half) {
    if (threadIdx.x / 16 == half) {
      buffer[threadIdx.x * 2] = 1.0f;  // counted
    }
    __syncwarp();
  }
}
// A turn of the loop is one for all lanes, whichever turns each of them skips.
__global__ void turns_skipped(int stride) {
  DEEPEN_SHARED(float, buffer);
  for (int i = 0; i < stride; ++i) {
    if ((int(threadIdx.x) + i) % 3 == 0) continue;
    buffer[int(threadIdx.x) * stride + i] = 1.0f;  // counted
  }
}
__device__ __forceinline__ int turns(int wanted) {
  int done = 0;
  while (true) {
    if (done == wanted) return done;
    ++done;
  }
}
// After loops of different lengths the lanes go on together.
__global__ void after_uneven_loops() {
  DEEPEN_SHARED(float, buffer);
  for (int turn = 0; turn < 3; ++turn) {
    float sum = float(turns(int(threadIdx.x) % 5));
    for (unsigned i = 0; i < threadIdx.x % 7; ++i) sum += 1.0f;
    buffer[2 * threadIdx.x + unsigned(turn)] = sum;  // counted
  }
}
__global__ void none(float* out) { out[threadIdx.x] = 1.0f; }

}  // namespace

int main() {
  float room[32], *const out = room;
  DEEPEN_LAUNCH(strided, 1, 64, 2 * kBytes, nullptr, 2);
  DEEPEN_LAUNCH(eight_ways, 1, 32, kBytes, nullptr, 8);
  DEEPEN_LAUNCH(odd_stride, 1, 32, 0, nullptr, 9);
  DEEPEN_LAUNCH(broadcast, 1, 32, kBytes, nullptr, out);
  DEEPEN_LAUNCH(sixteen_bytes, 1, 32, kBytes, nullptr, out);
  DEEPEN_LAUNCH(eight_bytes, 1, 32, kBytes, nullptr, out);
  DEEPEN_LAUNCH(atomics_at_four_words, 1, 32, 0, nullptr);
  DEEPEN_LAUNCH(in_a_loop, 1, 32, kBytes, nullptr, 8);
  DEEPEN_LAUNCH(apart, 1, 32, kBytes, nullptr);
  DEEPEN_LAUNCH(turns_skipped, 1, 32, kBytes, nullptr, 9);
  DEEPEN_LAUNCH(after_uneven_loops, 1, 32, kBytes, nullptr);
  DEEPEN_LAUNCH(none, 1, 32, 0, nullptr, out);
  std::fputs(deepen_emulator_bank_report(), stdout);
  return 0;
}
