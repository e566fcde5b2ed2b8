// The anchors that a row's candidates name, numbered on the device. anchor_groups.cuh groups their entries.
//
// Run to run the bits must be the same, so nothing may depend on which thread came first. Two bits for each
// anchor, set by any thread, say whether a candidate names it, and whether several do. An anchor that one
// candidate names is single: its number is its rank among the single ones. Shared anchors are numbered after
// them. Every sum over anchors runs by number and every sum over an anchor's entries by candidate, so the
// order is the data's own. The entries of shared anchors are grouped by counting, not by sorting: each such
// anchor has one bit for each of 32 * words candidates of a pass, and an entry's rank within its anchor is
// the number of bits below its own.
//
// In real rows most anchors are single, and some are named by most candidates. What all threads do to one
// address one after the other would take longer than all else: a bit that is set is not set again, and a long
// anchor's entries are summed by several lanes.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/block_reduce.cuh"
#include "core/cuda.h"
#include "ops/relative_map.h"
#include "ops/row_entries.cuh"

namespace deepen {

// Numbers of anchors, candidates and entries: two bytes are enough for what fits shared memory.
template <bool kShared>
using SearchNumber = std::conditional_t<kShared, uint16_t, int32_t>;

// Two counts in one integer.
template <class Number>
using TwoCounts = std::conditional_t<sizeof(Number) == 2, uint32_t, uint64_t>;
template <class Number>
constexpr TwoCounts<Number> kSecond = TwoCounts<Number>(1) << (8 * sizeof(Number));

template <class Number>
struct AnchorIndex {
  int32_t candidates;
  int32_t pitch;     // entry j of candidate t is at t * pitch + j; a multiple of 4
  int32_t single;    // anchors with one entry: numbers below this
  int32_t touched;   // all named anchors
  int32_t* lengths;  // [candidates] entries of each
  float* uniform;    // [candidates] u_t
  Number* numbers;   // [candidates * pitch] the entry's anchor; after the last entry 0 up to a multiple of 4
  float* excess;     // [candidates * pitch] value - u_t; likewise

  // Until group_entries.
  int32_t* columns;   // [candidates * pitch] until number_anchors ends
  uint64_t* named;    // [words] a bit for each anchor that is named
  uint64_t* several;  // [words] and for each that several entries name
  Number* before;     // [2 * words] how many single and shared anchors the words below have
  int32_t words;

  // From group_entries on.
  Number* starts;            // [touched - single + 1] of each shared anchor's entries
  Number* group_candidates;  // [entries] those of single anchors first, by number
  float* group_excess;       // [entries]
  Number* short_anchors;     // [short_count] shared anchors with up to kShortEntries, without `single`
  Number* long_anchors;      // [long_count]
  int32_t short_count, long_count;
  uint32_t* bits;     // [bit words * shared anchors] scratch
  int32_t bits_room;  // uint32s of bits, at least one for each shared anchor
};

// Sums of two values over the block; every thread gets the same bits. One barrier: `scratch` (kMaxWarps) must
// not be used again before the next one.
__device__ __forceinline__ float2 warp_sum(float2 value) {
  return make_float2(warp_reduce(value.x, Plus{}), warp_reduce(value.y, Plus{}));
}
__device__ __forceinline__ float2 block_sum(float2 value, float2* scratch) {
  value = warp_sum(value);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  const int lane = int(threadIdx.x) % 32;
  return warp_sum(lane < kSearchWarps ? scratch[lane] : make_float2(0.0f, 0.0f));
}

// The sum of the threads' values below this one, and of all. One barrier, as above.
template <class T>
__device__ __forceinline__ T block_exclusive_sum(T value, T* total, T* scratch) {
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const T inclusive = warp_inclusive_sum(value);
  if (lane == 31) scratch[warp] = inclusive;
  __syncthreads();
  const T other = lane < kSearchWarps ? scratch[lane] : 0;
  *total = warp_reduce(other, Plus{});
  return inclusive - value + warp_reduce(lane < warp ? other : T(0), Plus{});
}

// How many of `size` neighbours a thread takes: an odd number, so that the threads of a warp meet different
// banks of shared memory.
__device__ __forceinline__ int32_t odd_share(int32_t size) {
  return ((size + kSearchThreads - 1) / kSearchThreads) | 1;
}

// visit(t, e, count) by one lane for each four entries from e on of candidates first <= t < end, of which
// `count` are there.
template <class Number, class Visit>
__device__ __forceinline__ void for_each_kept(const AnchorIndex<Number>& index, int32_t first, int32_t end,
                                              Visit visit) {
  const int32_t part = int32_t(threadIdx.x) % kRowLanes;
#pragma unroll 1
  for (int32_t t = first + int32_t(threadIdx.x) / kRowLanes; t < end; t += kSearchThreads / kRowLanes) {
    const int32_t length = index.lengths[t];
#pragma unroll 1
    for (int32_t j = 4 * part; j < length; j += kRowChunk) visit(t, t * index.pitch + j, min(4, length - j));
  }
}

// No anchor is named. A barrier must follow.
template <class Number>
__device__ __forceinline__ void clear_named(const AnchorIndex<Number>& index) {
#pragma unroll 1
  for (int32_t w = int32_t(threadIdx.x); w < index.words; w += kSearchThreads)
    index.named[w] = index.several[w] = 0;
}

// By any number of threads at once. A row that names an anchor twice makes it shared, too.
template <class Number>
__device__ __forceinline__ void name(const AnchorIndex<Number>& index, int32_t column) {
  uint32_t* const named = reinterpret_cast<uint32_t*>(index.named) + column / 32;
  uint32_t* const several = reinterpret_cast<uint32_t*>(index.several) + column / 32;
  const uint32_t bit = 1u << (column % 32);
  const volatile uint32_t* const seen = named;
  const volatile uint32_t* const seen_again = several;
  const bool first = (*seen & bit) == 0 && (atomicOr(named, bit) & bit) == 0;
  if (!first && (*seen_again & bit) == 0) atomicOr(several, bit);
}

// The named anchor's number, or -1 if no candidate names it.
template <class Number>
__device__ __forceinline__ int32_t find(const AnchorIndex<Number>& index, int32_t column) {
  const int32_t w = column / 64;
  const uint64_t named = index.named[w], several = index.several[w], bit = uint64_t(1) << (column % 64);
  if ((named & bit) == 0) return -1;
  const bool shared = (several & bit) != 0;
  const uint64_t like = shared ? several : named & ~several;
  return (shared ? index.single : 0) + index.before[2 * w + shared] + __popcll(like & (bit - 1));
}

// to[number] = from[column] for each named anchor: a thread a word of bits at a time, two loads under way.
template <class Number>
__device__ __forceinline__ void gather_named(const AnchorIndex<Number>& index, const float* from, float* to) {
#pragma unroll 1
  for (int32_t w = int32_t(threadIdx.x); w < index.words; w += kSearchThreads) {
    const uint64_t several = index.several[w];
    uint64_t single = index.named[w] & ~several, shared = several;
    int32_t next_single = index.before[2 * w], next_shared = index.single + index.before[2 * w + 1];
#pragma unroll 1
    while ((single | shared) != 0) {
      const float one = single != 0 ? from[64 * w + __ffsll(int64_t(single)) - 1] : 0.0f;
      const float other = shared != 0 ? from[64 * w + __ffsll(int64_t(shared)) - 1] : 0.0f;
      if (single != 0) to[next_single++] = one;
      if (shared != 0) to[next_shared++] = other;
      single &= single - 1;
      shared &= shared - 1;
    }
  }
}

// Keeps the candidates' rows and numbers the anchors they name. `ids` were written and clear_named was called
// before the last barrier. Ends in a barrier.
template <class Number>
__device__ __forceinline__ void number_anchors(AnchorIndex<Number>& index, const RelativeRows& rows,
                                               const int32_t* ids, int32_t anchors,
                                               TwoCounts<Number>* scratch) {
  const float* const no_probs = nullptr;
  for_each_entry(
      rows, ids, no_probs, index.candidates, anchors,
      [&](int32_t t, int32_t part, int32_t length, float share, float) {
        if (part == 0) {
          index.lengths[t] = length;
          index.uniform[t] = share;
        }
      },
      [&](int32_t t, int32_t j, int32_t count, const Four<int32_t>& columns, const Four<float>& excess,
          float) {
        const int32_t e = t * index.pitch + j;
        put_four(index.columns + e, columns);
        put_four(index.excess + e, excess);
#pragma unroll
        for (int q = 0; q < 4; ++q)
          if (q < count) name(index, columns.of[q]);
      });
  __syncthreads();

  const auto counts = [&](int32_t w) {
    const int32_t shared = __popcll(index.several[w]), all = __popcll(index.named[w]);
    return TwoCounts<Number>(all - shared) + shared * kSecond<Number>;
  };
  const int32_t each = odd_share(index.words);
  const int32_t begin = min(int32_t(threadIdx.x) * each, index.words);
  const int32_t end = min(begin + each, index.words);
  TwoCounts<Number> own = 0, all;
#pragma unroll 1
  for (int32_t w = begin; w < end; ++w) own += counts(w);
  TwoCounts<Number> before = block_exclusive_sum(own, &all, scratch);
  index.single = int32_t(all % kSecond<Number>);
  index.touched = index.single + int32_t(all / kSecond<Number>);
#pragma unroll 1
  for (int32_t w = begin; w < end; ++w) {
    index.before[2 * w] = Number(before % kSecond<Number>);
    index.before[2 * w + 1] = Number(before / kSecond<Number>);
    before += counts(w);
  }
  __syncthreads();
  for_each_kept(index, 0, index.candidates, [&](int32_t, int32_t e, int32_t count) {
    const Four<int32_t> columns = get_four(index.columns + e);
    Four<Number> numbers{};
#pragma unroll
    for (int q = 0; q < 4; ++q)
      if (q < count) numbers.of[q] = Number(find(index, columns.of[q]));
    put_four(index.numbers + e, numbers);
  });
  __syncthreads();
}

}  // namespace deepen
