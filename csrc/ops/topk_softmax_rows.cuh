// What both ways of topk_softmax.cu share: a row's softmax statistics, in parts and whole, and its results.
#pragma once

#include <cmath>

#include "core/block_select.cuh"
#include "ops/topk_softmax.h"

namespace deepen {
namespace {

constexpr int kMaxSplits = 64;  // parts of a row that blocks look at

struct RowStats {
  float largest;
  float sum;  // of exp(logit - largest)
};

// The largest so far and the sum of exponentials relative to it. NaN and +inf - inf go into the sum and stay.
struct RunningStats {
  float largest = -INFINITY;
  float sum = 0.0f;

  __device__ __forceinline__ float base() const { return largest == -INFINITY ? 0.0f : largest; }
  __device__ __forceinline__ void raise(float other) {
    if (other > largest) {
      sum *= __expf(largest - other);
      largest = other;
    }
  }
  __device__ __forceinline__ void add(float value) {
    raise(value);
    sum += __expf(value - base());
  }
};

// The whole block's, from each thread's own.
__device__ __forceinline__ RowStats combine(float largest, float sum, SelectScratch* scratch) {
  const float most = block_reduce(largest, -INFINITY, Larger(), scratch->numbers);
  const float scale = largest == -INFINITY ? (most == -INFINITY ? 1.0f : 0.0f) : expf(largest - most);
  return {most, block_reduce(sum * scale, 0.0f, Plus(), scratch->numbers)};
}

// A float's bits in an order of unsigned integers, as in pack_key; the lowest key with them.
__device__ __forceinline__ uint32_t value_bits(float value) { return uint32_t(pack_key(value, 0) >> 32); }
__device__ __forceinline__ uint64_t lowest_key(uint32_t bits) { return uint64_t(bits) << 32; }

// The whole warp's, from each lane's own. All lanes call. No largest is NaN.
__device__ __forceinline__ RowStats combine_warp(RowStats own) {
  // On integers this is one instruction, and five shuffles on floats.
  const float most = key_value(lowest_key(__reduce_max_sync(kWholeWarp, value_bits(own.largest))));
  const float scale = own.largest == -INFINITY ? (most == -INFINITY ? 1.0f : 0.0f) : expf(own.largest - most);
  return {most, warp_reduce(own.sum * scale, Plus())};
}

// A row's, from its parts'.
__device__ __forceinline__ RowStats merge_stats(const RowStats* parts, int splits, SelectScratch* scratch) {
  RowStats part{-INFINITY, 0.0f};
  if (int(threadIdx.x) < splits) part = parts[threadIdx.x];
  return combine(part.largest, part.sum, scratch);
}

// The row's results from its sorted keys.
__device__ void write_row(const TopkSoftmaxParams& params, int64_t row, const uint64_t* sorted,
                          const RowStats& stats, SelectScratch* scratch) {
  float kept = 0.0f;
  for (int64_t i = threadIdx.x; i < params.k; i += kSelectThreads) {
    const float weight = expf(key_value(sorted[i]) - stats.largest);
    params.ids[row * params.k + i] = int32_t(key_index(sorted[i]));
    params.probs[row * params.k + i] = weight / stats.sum;
    kept += weight;
  }
  kept = block_reduce(kept, 0.0f, Plus(), scratch->numbers);
  if (threadIdx.x != 0) return;
  // k = V leaves nothing; rounding must not leave a trace of it.
  const bool nothing_left = params.k == params.vocab || kept >= stats.sum;
  params.tail[row] = nothing_left ? 0.0f : (stats.sum - kept) / stats.sum;
  params.status[row] = stats.sum != stats.sum       ? kRowNotFinite
                       : stats.largest == -INFINITY ? kRowEmpty
                                                    : kRowOk;
}

}  // namespace
}  // namespace deepen
