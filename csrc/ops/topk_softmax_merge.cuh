// The second kernel of topk_softmax.cu: a row's k largest from the lists that its slices handed on.
#pragma once

#include "ops/topk_softmax_lists.cuh"

namespace deepen {
namespace {

constexpr int kMergeKeys = 16;  // of a thread in a round
constexpr int kOwnSamples = kMaxSamples / kSelectThreads;

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
  // Key number i of this thread, 0 for none; in the first round, and in any.
  __device__ __forceinline__ uint64_t load_first(int i, const ListScratch* scratch) const {
    const int from = split(i), at = place(i, 0);
    return from < splits && at < scratch->heads_of[from] ? candidates[from * room + at] : 0;
  }
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
  const TopkSoftmaxParams& params = member.params;
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
  if (thread == 0) scratch->count = scratch->kept = 0;
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
  for (int i = 0; i < kMergeKeys; ++i) keys[i] = lists.load_first(i, scratch);
  if (warp < 2) {
    const RowStats own = combine_warp(thread < splits ? facts.stats : RowStats{-INFINITY, 0.0f});
    if (thread % 32 == 0) scratch->warp_stats[warp] = own;
  }
  const auto sample = [&](int i) { return samples[i]; };
  uint64_t bar = lowest_key(bar_of<kOwnSamples>(sample, k, scratch));
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
