// topk_softmax for k whose lists do not fit shared memory: a row's keys are written to the workspace, padded
// to a power of two, and sorted there by a bitonic network. Steps over pairs less than kNear apart run in
// shared memory, many in a launch; the others in a launch each (38 launches for V 262,144). Plain, and rarely
// wanted.
#pragma once

#include "ops/topk_softmax_rows.cuh"

namespace deepen {
namespace {

constexpr int kNear = 2048;  // keys that a block sorts in shared memory; a row has as many at least

int64_t padded(int64_t vocab) {
  int64_t size = kNear;
  while (size < vocab) size *= 2;
  return size;
}

template <class T>
__global__ void __launch_bounds__(kSelectThreads)
    topk_keys(TopkSoftmaxParams params, RowStats* stats, uint64_t* sorted, int splits, int64_t size) {
  DEEPEN_SHARED(SelectScratch, scratch);
  const int64_t row = blockIdx.x / unsigned(splits);
  const int split = int(blockIdx.x % unsigned(splits));
  const T* const logits = static_cast<const T*>(params.logits) + row * params.vocab;
  uint64_t* const keys = sorted + row * size;
  RunningStats running;
  for (int64_t i = int64_t(split) * kSelectThreads + threadIdx.x; i < size; i += splits * kSelectThreads) {
    uint64_t key = 0;
    if (i < params.vocab) {
      const float value = to_float(logits[i]);
      running.add(value);
      key = pack_key(value, uint32_t(i));
    }
    keys[i] = key;
  }
  const RowStats slice = combine(running.largest, running.sum, scratch);
  if (threadIdx.x == 0) stats[row * kMaxSplits + split] = slice;
}

// The lower one of pair i of those `distance` apart, and whether its run of `run` keys falls: runs alternate
// between falling and rising until one run is the row, of `size` keys. All are powers of two.
__device__ __forceinline__ int64_t lower_of_pair(int64_t i, int64_t distance) {
  return (i & ~(distance - 1)) * 2 + (i & (distance - 1));
}
__device__ __forceinline__ bool falls(int64_t at, int64_t run, int64_t size) {
  return (at & (size - 1) & run) == 0;
}
__device__ __forceinline__ void sort_pair(uint64_t& one, uint64_t& other, bool falling) {
  if ((one < other) != falling) return;
  const uint64_t kept = one;
  one = other;
  other = kept;
}

// One step of the network over rows of `size` keys.
__global__ void __launch_bounds__(kSelectThreads)
    sort_step(uint64_t* keys, int64_t pairs, int64_t size, int64_t run, int64_t distance) {
  const int64_t threads = int64_t(gridDim.x) * kSelectThreads;
  for (int64_t i = int64_t(blockIdx.x) * kSelectThreads + threadIdx.x; i < pairs; i += threads) {
    const int64_t low = lower_of_pair(i, distance);
    sort_pair(keys[low], keys[low + distance], falls(low, run, size));
  }
}

// The steps of runs `run` to `last` over pairs less than kNear apart; a block kNear keys.
__global__ void __launch_bounds__(kSelectThreads)
    sort_near(uint64_t* keys, int64_t size, int64_t run, int64_t last) {
  DEEPEN_STATIC_SHARED(uint64_t, near, kNear);
  const int64_t start = int64_t(blockIdx.x) * kNear;
  for (int i = int(threadIdx.x); i < kNear; i += kSelectThreads) near[i] = keys[start + i];
  for (; run <= last; run *= 2) {
    for (int64_t distance = run / 2 < kNear / 2 ? run / 2 : kNear / 2; distance > 0; distance /= 2) {
      __syncthreads();
      for (int i = int(threadIdx.x); i < kNear / 2; i += kSelectThreads) {
        const int64_t low = lower_of_pair(i, distance);
        sort_pair(near[low], near[low + distance], falls(start + low, run, size));
      }
    }
  }
  __syncthreads();
  for (int i = int(threadIdx.x); i < kNear; i += kSelectThreads) keys[start + i] = near[i];
}

__global__ void __launch_bounds__(kSelectThreads)
    write_sorted(TopkSoftmaxParams params, const RowStats* parts, const uint64_t* sorted, int splits,
                 int64_t size) {
  DEEPEN_SHARED(SelectScratch, scratch);
  const int64_t row = blockIdx.x;
  const RowStats stats = merge_stats(parts + row * kMaxSplits, splits, scratch);
  write_row(params, row, sorted + row * size, stats, scratch);
}

}  // namespace
}  // namespace deepen
