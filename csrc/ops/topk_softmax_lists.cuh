// What the two kernels of topk_softmax.cu do with lists of keys: bars from the threads' largest logits, and
// the end, from a list to a row's results.
#pragma once

#include "ops/topk_softmax_plan.cuh"

namespace deepen {
namespace {

struct alignas(16) ListScratch : SelectScratch {
  alignas(16) uint32_t bests[kSelectThreads];     // the threads' largest logits
  alignas(16) uint32_t warp_bars[kSliceWarps];    // value bits, as all that follow
  alignas(16) uint32_t warp_lowest[kSliceWarps];  // of a warp's samples, or of topk_merge's
  alignas(16) uint32_t warp_highest[kSliceWarps];
  RowStats warp_stats[kSliceWarps];
  RowStats stats;             // the row's, or the slice's
  uint32_t heads, tails;      // lengths of the list that is handed on
  uint32_t kept;              // of the keys at the end
  int overflown[2], more[2];  // the last round that was, by its parity
  int length[kMaxSplits], heads_of[kMaxSplits];
};
static_assert(sizeof(ListScratch) % 16 == 0, "lists come after it");

__device__ __forceinline__ uint32_t smallest(const uint32_t* of_warps) {
  uint32_t found = ~0u;
#pragma unroll
  for (int i = 0; i < kSliceWarps; i += 4) {
    const uint4 four = *reinterpret_cast<const uint4*>(of_warps + i);
    found = min(min(found, min(four.x, four.y)), min(four.z, four.w));
  }
  return found;
}

// Whether any thread is `concerned`, in this round; rounds are counted from 1. One barrier, which also makes
// visible what was written before it. `last` has two entries, so that a thread may be a round ahead.
__device__ __forceinline__ bool any_thread(bool concerned, int round, int* last) {
  if (concerned) last[round % 2] = round;
  __syncthreads();
  return last[round % 2] == round;
}

// From each thread's largest logit so far (`best`, value bits; 0 if it has none) and k: a bar that at least k
// keys of the block reach, 0 if it has fewer or k is too large. Every warp has ceil(k / warps) threads whose
// largest is not below its bar, and the block's bar is the lowest of the warps'. Has one barrier. Afterwards
// scratch->warp_lowest has the lowest of each warp's `samples` largest. Returns the thread's sample, whose
// lowest five bits are 0, plus its place among the warp's, 0 the largest.
__device__ __forceinline__ uint32_t find_bar(uint32_t best, int k, int samples, uint64_t& bar,
                                             ListScratch* scratch) {
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int wanted = (k + kSliceWarps - 1) / kSliceWarps;
  const uint32_t mine = (best & ~31u) | uint32_t(lane);  // a little lower, and different for each lane
  scratch->bests[threadIdx.x] = mine;
  __syncwarp();
  int rank = 0;
#pragma unroll
  for (int i = 0; i < 32; i += 4) {
    const uint4 others = *reinterpret_cast<const uint4*>(scratch->bests + warp * 32 + i);
    rank += int(others.x > mine) + int(others.y > mine) + int(others.z > mine) + int(others.w > mine);
  }
  const uint32_t sample = mine & ~31u, found = sample + uint32_t(rank);
  if (rank == wanted - 1) scratch->warp_bars[warp] = sample;
  if (rank == samples - 1) scratch->warp_lowest[warp] = sample;
  __syncthreads();
  if (wanted > 32) return found;
  const uint64_t lowest = lowest_key(smallest(scratch->warp_bars));
  bar = lowest > bar ? lowest : bar;
  return found;
}

// Cuts a list that `append` had no room in, and appends what was left out, until all have been seen. Returns
// the new bar. All threads call, with one more round each time; one barrier if nothing was left out. This is
// rare: `key` reads a key again, so that it need not be held until here.
template <class Key>
__device__ __forceinline__ uint64_t make_room(uint32_t left_out, Key key, uint64_t bar, int& round,
                                              uint64_t* list, int capacity, uint64_t* spare, int k,
                                              ListScratch* scratch) {
  while (any_thread(left_out != 0, ++round, scratch->overflown)) {
    bar = cut_to_largest(list, capacity, k, spare, scratch);
    uint32_t again = 0;
    for (; left_out != 0; left_out &= left_out - 1) {
      const int i = __ffs(int(left_out)) - 1;
      const uint64_t one = key(i);
      if (one < bar) continue;
      const uint32_t at = atomicAdd(&scratch->count, 1u);
      if (at < uint32_t(capacity)) {
        list[at] = one;
      } else {
        again |= 1u << i;
      }
    }
    left_out = again;
  }
  return bar;
}

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

constexpr int kValueBins = kSelectThreads;

// Value bits that at least `wanted` of the values reach and not many more, except ties; 0 if there are fewer
// values. value(i) gives each thread's kOwn, as value bits, 0 for none. Counts them by size between the
// lowest and the highest, then within the bin that has the `wanted`-th.
template <int kOwn, class Value>
__device__ __forceinline__ uint32_t bar_of(Value value, int wanted, ListScratch* scratch) {
  constexpr int kUnrolled = kOwn <= 2 ? kOwn : 1;  // more are not held in registers
  const int thread = int(threadIdx.x), lane = thread % 32, warp = thread / 32;
  uint32_t low = ~0u, high = 0;
#pragma unroll(kUnrolled)
  for (int i = 0; i < kOwn; ++i) {
    const uint32_t one = value(i);
    low = one != 0 ? min(low, one) : low;
    high = max(high, one);
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
    const int shift = width < kValueBins ? 0 : 32 - __clz(int(width)) - 9;
#pragma unroll(kUnrolled)
    for (int i = 0; i < kOwn; ++i) {
      const uint32_t one = value(i);
      if (one != 0 && one >= low && one <= high) atomicAdd(&scratch->bins[(one - low) >> shift], 1u);
    }
    __syncthreads();
    const uint32_t bin = uint32_t(kValueBins - 1 - thread), own = scratch->bins[bin];
    uint32_t upto = warp_inclusive_sum(own);
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

// Writes the keys of a list that reach the bar to `out`: those that reach `head_bar` from its front, counted
// in scratch->heads, the others from its end, in scratch->tails; both counts are 0 before. If they are more
// than its `room`, the list is cut to its k largest. Ends in a barrier.
__device__ __forceinline__ void hand_on(uint64_t* list, int count, uint64_t bar, uint64_t head_bar,
                                        uint64_t* out, int room, uint64_t* spare, int k,
                                        ListScratch* scratch) {
  for (;;) {
    for (int base = 0; base < count; base += kSelectThreads) {
      const int i = base + int(threadIdx.x);
      const uint64_t key = i < count ? list[i] : 0;
      const bool goes = key != 0 && key >= bar, is_head = key >= head_bar;
      const int head = int(claim(goes && is_head, &scratch->heads));
      const int tail = int(claim(goes && !is_head, &scratch->tails));
      if (goes && (is_head ? head : tail) < room) out[is_head ? head : room - 1 - tail] = key;
    }
    __syncthreads();
    if (int(scratch->heads + scratch->tails) <= room) return;
    bar = cut_to_largest(list, count, k, spare, scratch);
    count = k;
    if (threadIdx.x == 0) scratch->heads = scratch->tails = 0;
    __syncthreads();
  }
}

constexpr int kNarrowed = 4;  // keys of a thread

// Leaves out most of the keys that are not among the k largest, if the others fit in `spare`, which has
// `room`. Returns how many there are; the caller's barrier makes them visible. scratch->kept is 0 before.
__device__ __forceinline__ int narrow(uint64_t* list, int count, int k, uint64_t* spare, int room,
                                      ListScratch* scratch) {
  const int thread = int(threadIdx.x);
  const auto key = [&](int i) {
    return i * kSelectThreads + thread < count ? list[i * kSelectThreads + thread] : uint64_t(0);
  };
  const auto value = [&](int i) { return uint32_t(key(i) >> 32); };
  const uint64_t bar = lowest_key(bar_of<kNarrowed>(value, k, scratch));
#pragma unroll 1
  for (int i = 0; i < kNarrowed; ++i) {
    const uint64_t one = key(i);
    const bool stays = one != 0 && one >= bar;
    const int at = int(claim(stays, &scratch->kept));
    if (stays && at < room) spare[at] = one;
  }
  __syncthreads();
  const int kept = int(scratch->kept);
  if (kept > room) return count;
  for (int i = thread; i < kept; i += kSelectThreads) list[i] = spare[i];
  return kept;
}

// A row's results from a list with its k largest keys, which all threads see; scratch->stats are the row's.
// Both the list and `spare` become scratch, and have list_room(k) places and two more.
__device__ __forceinline__ void finish_row(const TopkSoftmaxParams& params, int64_t row, uint64_t* list,
                                           int count, uint64_t* spare, ListScratch* scratch) {
  const int k = int(params.k);
  // A bar costs as much as the comparisons of these keys.
  if (count > k + 100 && count <= kNarrowed * kSelectThreads) {
    count = narrow(list, count, k, spare, list_room(k), scratch);
  }
  if (count > k + 256) {
    cut_to_largest(list, count, k, spare, scratch);
    count = k;
  }
  sort_by_rank(list, count, k, spare);
  write_row(params, row, spare, scratch->stats, scratch);
}

}  // namespace
}  // namespace deepen
