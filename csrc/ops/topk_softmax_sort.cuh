// topk_softmax for k whose lists do not fit shared memory: a row's keys are written to the workspace, padded
// to a power of two, and sorted there. A bitonic network, one launch a step: log2(V) (log2(V) + 1) / 2
// launches (171 for V 262,144), each reading and writing the row's keys. Plain, and rarely wanted.
#pragma once

#include "ops/topk_softmax_rows.cuh"

namespace deepen {
namespace {

int64_t padded(int64_t vocab) {
  int64_t size = 1;
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

// One step of the bitonic network over rows of `size` keys, a power of two: pairs `distance` apart in runs of
// `run`, which alternate between falling and rising until one run is the row.
__global__ void __launch_bounds__(kSelectThreads)
    sort_step(uint64_t* keys, int64_t pairs, int64_t size, int64_t run, int64_t distance) {
  const int64_t threads = int64_t(gridDim.x) * kSelectThreads;
  for (int64_t i = int64_t(blockIdx.x) * kSelectThreads + threadIdx.x; i < pairs; i += threads) {
    const int64_t low = (i & ~(distance - 1)) * 2 + (i & (distance - 1));
    const bool falling = (low & (size - 1) & run) == 0;
    const uint64_t one = keys[low], other = keys[low + distance];
    if ((one < other) == falling) {
      keys[low] = other;
      keys[low + distance] = one;
    }
  }
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
