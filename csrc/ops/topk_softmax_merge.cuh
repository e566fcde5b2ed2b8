// The second kernel of topk_softmax.cu: a row's k largest from the lists that its slices handed on.
#pragma once

#include "ops/topk_softmax_lists.cuh"

namespace deepen {
namespace {

constexpr int kMergeKeys = 16;  // of a thread in a round
constexpr int kSampleBins = kSelectThreads;
constexpr int kOwnSamples = kMaxSamples / kSelectThreads;

__device__ __forceinline__ uint32_t sum_before(const uint32_t* of_warps, int warp) {
  uint32_t sum = 0;
#pragma unroll
  for (int i = 0; i < kSliceWarps; i += 4) {
    const uint4 four = *reinterpret_cast<const uint4*>(of_warps + i);
    sum += (i < warp ? four.x : 0) + (i + 1 < warp ? four.y : 0) + (i + 2 < warp ? four.z : 0) +
           (i + 3 < warp ? four.w : 0);
  }
  return sum;
}

// Value bits that at least `wanted` of the samples reach and not many more, except ties; 0 if there are fewer
// samples. Each thread has kOwnSamples, 0 for none. Counts them by value between the lowest and the highest,
// then within the bin that has the `wanted`-th.
__device__ __forceinline__ uint32_t bar_of_samples(const uint32_t* samples, int wanted,
                                                   ListScratch* scratch) {
  const int thread = int(threadIdx.x), lane = thread % 32, warp = thread / 32;
  uint32_t low = ~0u, high = 0;
#pragma unroll
  for (int i = 0; i < kOwnSamples; ++i) {
    low = samples[i] != 0 ? min(low, samples[i]) : low;
    high = max(high, samples[i]);
  }
  low = __reduce_min_sync(kWholeWarp, low);
  high = __reduce_max_sync(kWholeWarp, high);
  if (lane == 0) {
    scratch->warp_lowest[warp] = low;
    scratch->warp_highest[warp] = ~high;
  }
  scratch->bins[thread] = 0;
  if (thread == 0) scratch->above = ~0u;
  __syncthreads();
  low = smallest(scratch->warp_lowest);
  high = ~smallest(scratch->warp_highest);
  if (low > high) return 0;

  uint32_t left = uint32_t(wanted);
  for (;;) {
    const uint32_t width = high - low;
    const int shift = width < kSampleBins ? 0 : 32 - __clz(int(width)) - 9;
#pragma unroll
    for (int i = 0; i < kOwnSamples; ++i) {
      if (samples[i] != 0 && samples[i] >= low && samples[i] <= high) {
        atomicAdd(&scratch->bins[(samples[i] - low) >> shift], 1u);
      }
    }
    __syncthreads();
    const uint32_t bin = uint32_t(kSampleBins - 1 - thread), own = scratch->bins[bin];
    uint32_t upto = own;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const uint32_t above = __shfl_up_sync(kWholeWarp, upto, distance);
      if (lane >= distance) upto += above;
    }
    if (lane == 31) scratch->totals[warp] = upto;
    __syncthreads();
    scratch->bins[bin] = 0;
    upto += sum_before(scratch->totals, warp);
    if (upto - own < left && left <= upto) {  // one thread, or none
      scratch->bin = bin;
      scratch->above = upto - own;
      scratch->inside = own;
    }
    __syncthreads();
    const uint32_t above = scratch->above, inside = scratch->inside;
    if (above == ~0u) return 0;
    low += scratch->bin << shift;
    if (shift == 0 || above + inside <= left + left / 4 + 8) return low;
    high = low + ((1u << shift) - 1u);
    left -= above;
  }
}

// The keys of a row's lists come in rounds of kMergeKeys * kSelectThreads: to each list the same number of
// places, 2^`places_log2`. Heads first; the first round has no tails.
struct MergeRound {
  const uint64_t* candidates;
  int room, splits, places_log2;

  __device__ __forceinline__ int split(int i) const {
    return (i * kSelectThreads + int(threadIdx.x)) >> places_log2;
  }
  __device__ __forceinline__ int place(int i, int round) const {
    const int places = 1 << places_log2;
    return ((i * kSelectThreads + int(threadIdx.x)) & (places - 1)) + round * places;
  }
  __device__ __forceinline__ int first_tail(int heads) const { return max(heads, 1 << places_log2); }
  // Key number i of this thread, 0 for none.
  __device__ __forceinline__ uint64_t load(int i, int round, const ListScratch* scratch) const {
    const int from = split(i), at = place(i, round);
    if (from >= splits || at >= scratch->length[from]) return 0;
    const int heads = scratch->heads_of[from], tail = at - first_tail(heads);
    if (at >= heads && tail < 0) return 0;
    return candidates[from * room + (at < heads ? at : room - 1 - tail)];
  }
};

__global__ void __launch_bounds__(kSelectThreads) topk_merge(const Plan plan) {
  DEEPEN_SHARED(ListScratch, scratch);
  const MemberPlan& member = plan.members[blockIdx.y];
  const TopkSoftmaxParams params = member.params;
  if (member.splits == 1 || blockIdx.x >= params.batch) return;
  const int splits = member.splits, capacity = member.capacity, k = int(params.k), room = list_room(k);
  uint64_t* const list = reinterpret_cast<uint64_t*>(scratch + 1);
  uint64_t* const spare = list + capacity + 2;
  const int thread = int(threadIdx.x), warp = thread / 32;
  const int64_t row = blockIdx.x;

  const int count = splits * kSliceWarps * samples_of_warp(splits);
  uint32_t samples[kOwnSamples];
#pragma unroll
  for (int i = 0; i < kOwnSamples; ++i) {
    const int at = i * kSelectThreads + thread;
    samples[i] = at < count ? member.samples[row * count + at] : 0;
  }
  if (thread < 2) scratch->overflown[thread] = scratch->more[thread] = 0;
  if (thread == 0) scratch->count = 0;
  SliceFacts facts{};
  if (thread < splits) {
    facts = member.facts[row * splits + thread];
    scratch->heads_of[thread] = scratch->length[thread] = int(facts.heads);
  }
  __syncthreads();

  // The first round's keys are on their way while the bar is found.
  MergeRound lists{member.candidates + row * splits * room, room, splits, 0};
  while (splits << (lists.places_log2 + 1) <= kMergeKeys * kSelectThreads) ++lists.places_log2;
  uint64_t keys[kMergeKeys];
#pragma unroll
  for (int i = 0; i < kMergeKeys; ++i) keys[i] = lists.load(i, 0, scratch);
  if (warp < 2) {
    const RowStats own = combine_warp(thread < splits ? facts.stats : RowStats{-INFINITY, 0.0f});
    if (thread % 32 == 0) scratch->warp_stats[warp] = own;
  }
  uint64_t bar = lowest_key(bar_of_samples(samples, k, scratch));
  bar = bar == 0 ? 1 : bar;

  // The tails only of lists whose heads may not have all that reach the bar.
  if (thread < splits && facts.tails > 0 && lowest_key(facts.head_bar) > bar) {
    scratch->length[thread] = lists.first_tail(int(facts.heads)) + int(facts.tails);
  }
  if (warp == 0) {
    const RowStats part = thread < 2 ? scratch->warp_stats[thread] : RowStats{-INFINITY, 0.0f};
    const RowStats whole = combine_warp(part);
    if (thread == 0) scratch->stats = whole;
  }
  for (int round = 0, cuts = 0;; ++round) {
    uint32_t chosen = 0;
#pragma unroll
    for (int i = 0; i < kMergeKeys; ++i) chosen |= uint32_t(keys[i] >= bar) << i;
    const auto key = [&](int i) { return keys[i]; };
    const uint32_t left_out = append<kMergeKeys>(chosen, key, list, capacity, &scratch->count);
    const auto again = [&](int i) { return lists.load(i, round, scratch); };
    bar = make_room(left_out, again, bar, cuts, list, capacity, spare, k, scratch);
    const bool longer = thread < splits && scratch->length[thread] > (round + 1) << lists.places_log2;
    if (!any_thread(longer, round + 1, scratch->more)) break;
#pragma unroll
    for (int i = 0; i < kMergeKeys; ++i) keys[i] = lists.load(i, round + 1, scratch);
  }
  finish_row(params, row, list, int(scratch->count), spare, scratch);
}

}  // namespace
}  // namespace deepen
