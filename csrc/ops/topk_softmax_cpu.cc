// CPU twin of topk_softmax: one pass over the row. Each block updates the running maximum, the sum of
// exponentials relative to it (rescaled when it rises), and the list of candidates: keys above the k-th
// largest seen so far. The list is cut back to k when it might overflow, which raises the bar, so that on
// real logits almost every vector fails one comparison and is done.
//
// Sum, maximum and comparison share one loop, so that the memory brings logits all the time. With a second
// loop over the block for the exponentials it rests meanwhile: 1.3 times slower where the row is not in a
// cache.
#include <cmath>

#include "core/select.h"
#include "core/simd.h"
#include "ops/topk_softmax.h"
#include "ops/topk_softmax_keys.h"

namespace deepen {
namespace DEEPEN_ISA {

static const float kMinusInfinity = -INFINITY;

constexpr int64_t kGroup = 4 * kWidth;  // logits that one comparison with the bar can rule out
constexpr float kMostRise = 16.0f;      // of the maximum within a block, without a second look at it

static inline const float* as_floats(const float* from, int64_t, float*) { return from; }
template <class T>
static inline const float* as_floats(const T* from, int64_t count, float* buffer) {
  const int64_t whole = count / kWidth * kWidth;
  for (int64_t i = 0; i < whole; i += kWidth) store(buffer + i, load(from + i));
  for (int64_t i = whole; i < count; ++i) buffer[i] = to_float(from[i]);
  return buffer;
}

// Sum of exp(block - base) over `whole` logits, a multiple of kGroup.
static float sum_of_exp(const float* block, int64_t whole, float base) {
  const Vec shift = broadcast(base);
  Vec sums[4] = {};
  for (int64_t i = 0; i < whole; i += kGroup) {
    for (int lane = 0; lane < 4; ++lane) sums[lane] += exp(load(block + i + lane * kWidth) - shift);
  }
  return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <class T>
static void softmax_topk(const T* logits, const TopkSoftmaxParams& params, int64_t row, uint64_t* keys) {
  const int64_t vocab = params.vocab, k = params.k;
  const int64_t capacity = topk_softmax_keys(vocab, k);
  float buffer[kTopkBlock];
  float largest = kMinusInfinity;  // running maximum of the row
  double sum = 0.0;                // of exp(logit - largest)
  float bar = kMinusInfinity;      // the k-th largest so far, once `barred`
  bool barred = false;
  int64_t count = 0;

  for (int64_t begin = 0; begin < vocab; begin += kTopkBlock) {
    const int64_t size = vocab - begin < kTopkBlock ? vocab - begin : kTopkBlock;
    const int64_t whole = size / kGroup * kGroup;
    const float* block = as_floats(logits + begin, size, buffer);
    // A low bar lets many through, so it is raised early and often: a cut of a few k keys costs little.
    if (count + size > capacity || count > 4 * k + 256) {
      keep_largest(keys, count, k);
      count = k;
      uint64_t smallest = keys[0];
      for (int64_t i = 1; i < k; ++i) smallest = keys[i] < smallest ? keys[i] : smallest;
      bar = key_value(smallest);
      barred = true;
    }

    // Maximum, sum and candidates, four vectors to a comparison. Later ids lose ties, so a logit equal to the
    // bar is out.
    Vec maximum = broadcast(kMinusInfinity);
    const Vec bars = broadcast(bar), shift = broadcast(largest == kMinusInfinity ? 0.0f : largest);
    Vec sums[2] = {};
    for (int64_t i = 0; i < whole; i += kGroup) {
      Vec group[4];
      for (int lane = 0; lane < 4; ++lane) {
        group[lane] = load(block + i + lane * kWidth);
        sums[lane & 1] += exp(group[lane] - shift);
      }
      const Vec highest = max(max(group[0], group[1]), max(group[2], group[3]));
      maximum = max(highest, maximum);
      if (barred && greater_mask(highest, bars) == 0) continue;
      for (int64_t j = i; j < i + kGroup; j += kWidth) {
        uint32_t mask = barred ? greater_mask(load(block + j), bars) : (1u << kWidth) - 1u;
        for (; mask != 0; mask &= mask - 1) {
          const int64_t at = j + __builtin_ctz(mask);
          keys[count++] = pack_key(block[at], uint32_t(begin + at));
        }
      }
    }
    float block_sum = sum_lanes(sums[0] + sums[1]);
    float block_largest = max_lanes(maximum);
    for (int64_t i = whole; i < size; ++i) {
      if (block[i] > block_largest) block_largest = block[i];
      if (!barred || block[i] > bar) keys[count++] = pack_key(block[i], uint32_t(begin + i));
    }

    if (block_largest > largest) {
      // So far above the old maximum the exponentials lose digits or overflow: they are taken again.
      const bool again = !(block_largest - largest <= kMostRise);
      const double scale = std::exp(double(largest) - double(block_largest));
      sum *= scale;
      block_sum = again ? sum_of_exp(block, whole, block_largest) : float(double(block_sum) * scale);
      largest = block_largest;
    }
    sum += double(block_sum);
    // NaN goes through exp into the sum and stays there; +inf - inf makes one.
    const float base = largest == kMinusInfinity ? 0.0f : largest;
    for (int64_t i = whole; i < size; ++i) sum += double(expf(block[i] - base));
  }
  if (sum != sum || largest == kMinusInfinity) {
    params.status[row] = sum != sum ? kRowNotFinite : kRowEmpty;
    for (int64_t i = 0; i < k; ++i) params.ids[row * k + i] = -1;  // fuse refuses them
    return;
  }

  keep_largest(keys, count, k);
  sort_down(keys, k);
  int32_t* ids = params.ids + row * k;
  float* probs = params.probs + row * k;
  double kept = 0.0;
  for (int64_t i = 0; i < k; ++i) {
    const double weight = double(expf(key_value(keys[i]) - largest));
    ids[i] = int32_t(key_index(keys[i]));
    probs[i] = float(weight / sum);
    kept += weight;
  }
  // k = V leaves nothing; rounding must not leave a trace of it.
  params.tail[row] = k == vocab || kept >= sum ? 0.0f : float((sum - kept) / sum);
  params.status[row] = kRowOk;
}

void topk_softmax_row(const TopkSoftmaxParams& params, int64_t row, uint64_t* keys) {
  const int64_t offset = row * params.vocab;
  switch (params.dtype) {
    case Dtype::f32:
      return softmax_topk(static_cast<const float*>(params.logits) + offset, params, row, keys);
    case Dtype::f16: return softmax_topk(static_cast<const Half*>(params.logits) + offset, params, row, keys);
    case Dtype::bf16:
      return softmax_topk(static_cast<const BFloat16*>(params.logits) + offset, params, row, keys);
  }
}

}  // namespace DEEPEN_ISA
}  // namespace deepen
