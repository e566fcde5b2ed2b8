// The anchors that a row's candidates name, numbered on the device, and their entries grouped by anchor.
//
// Run to run the bits must be the same, so nothing may depend on which thread came first. An anchor's number
// is its rank among the named ones: a bit for each anchor, set by any thread, and counted. Every sum over
// anchors runs by number and every sum over an anchor's entries by candidate, so the order is the data's own.
// Entries are grouped by counting, not by sorting: each anchor has one bit for each of 32 * words candidates
// of a pass, and an entry's rank within its anchor is the number of bits below its own.
//
// A few anchors are named by most candidates of a real row ("hubs"). What all threads do to one address one
// after the other would take longer than all else: a bit that is set is not set again, and a hub's entries
// are summed by several lanes.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/block_reduce.cuh"
#include "core/cuda.h"
#include "ops/relative_map.h"

namespace deepen {

constexpr int kSearchThreads = 1024;
constexpr int kSearchWarps = kSearchThreads / 32;
constexpr int kRowsInFlight = 4;  // relative rows that a warp loads at once
constexpr int kSharedLanes = 4;   // lanes that sum the entries of an anchor with several

// Numbers of anchors, candidates and entries: two bytes are enough for what fits shared memory.
template <bool kShared>
using SearchNumber = std::conditional_t<kShared, uint16_t, int32_t>;

// Entries, and anchors with several, counted in one integer.
template <class Number>
using GroupSum = std::conditional_t<sizeof(Number) == 2, uint32_t, uint64_t>;
template <class Number>
constexpr GroupSum<Number> kOneShared = GroupSum<Number>(1) << (8 * sizeof(Number));

template <class Number>
struct AnchorIndex {
  int32_t candidates;
  int32_t pitch;  // entry j of candidate t is at t * pitch + j
  int32_t touched;
  int32_t shared_count;
  int32_t* lengths;  // [candidates] entries of each
  float* uniform;    // [candidates] u_t
  Number* numbers;   // [candidates * pitch] the entry's anchor
  float* excess;     // [candidates * pitch] value - u_t

  // Until group_entries.
  int32_t* columns;  // [candidates * pitch] until number_anchors ends
  uint32_t* named;   // [words] a bit for each anchor
  Number* before;    // [words] how many named anchors the words below have
  int32_t named_words;

  // From group_entries on.
  Number* starts;            // [touched + 1] of each anchor's entries
  Number* group_candidates;  // [entries]
  float* group_excess;       // [entries]
  Number* shared;            // [shared_count] the anchors with several entries
  uint32_t* bits;            // [bit_words * touched] scratch
  int32_t bits_room;         // uint32s of bits, at least one for each anchor
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
  T inclusive = value;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const T below = __shfl_up_sync(kWholeWarp, inclusive, distance);
    if (lane >= distance) inclusive += below;
  }
  if (lane == 31) scratch[warp] = inclusive;
  __syncthreads();
  const T other = lane < kSearchWarps ? scratch[lane] : 0;
  *total = warp_reduce(other, Plus{});
  return inclusive - value + warp_reduce(lane < warp ? other : T(0), Plus{});
}

// What one thread of `count` takes of `size` things when each takes neighbours: an odd number, so that
// the threads of a warp meet different banks of shared memory.
__device__ __forceinline__ int32_t odd_share(int32_t size) {
  return ((size + kSearchThreads - 1) / kSearchThreads) | 1;
}

// begin(t, length, share, prob) by every lane of the warp that has candidate t, then visit(t, j, column,
// excess, prob) by one lane for each of its entries; prob is probs[t], or 0 where probs is null. A token
// outside the vocabulary (of a row whose top-k failed) has no entries; a column that is no anchor ends a row,
// as -1 does.
//
// A warp loads several rows before it looks at the first. The loop that looks is not unrolled: what a block
// runs through once takes longer to fetch than to run.
template <class Begin, class Visit>
__device__ __forceinline__ void for_each_entry(const RelativeRows& rows, const int32_t* ids,
                                               const float* probs, int32_t count, int32_t anchors,
                                               Begin begin, Visit visit) {
  const int32_t lane = int32_t(threadIdx.x) % 32, entries = int32_t(rows.entries);
  const auto ends = [anchors](int32_t column) { return uint32_t(column) >= uint32_t(anchors); };
#pragma unroll 1
  for (int32_t first = int32_t(threadIdx.x) / 32; first < count; first += kSearchWarps * kRowsInFlight) {
    int32_t columns[kRowsInFlight];
    float values[kRowsInFlight], rest[kRowsInFlight], prob[kRowsInFlight];
    int64_t starts[kRowsInFlight];
#pragma unroll
    for (int i = 0; i < kRowsInFlight; ++i) {
      const int32_t t = first + i * kSearchWarps, token = t < count ? ids[t] : -1;
      const bool known = token >= 0 && token < rows.vocab;
      starts[i] = int64_t(token) * entries;  // not read where the token is not known
      columns[i] = known && lane < entries ? rows.columns[starts[i] + lane] : -1;
      values[i] = known && lane < entries ? rows.values[starts[i] + lane] : 0.0f;
      rest[i] = known ? rows.rest[token] : 0.0f;
      prob[i] = probs != nullptr && t < count ? probs[t] : 0.0f;
    }
#pragma unroll 1
    for (int32_t t = first; t < min(first + kSearchWarps * kRowsInFlight, count); t += kSearchWarps) {
      uint32_t ended = __ballot_sync(kWholeWarp, ends(columns[0]));
      int32_t length = 0;
#pragma unroll 1
      while (ended == 0 && length + 32 < entries) {
        length += 32;
        ended = __ballot_sync(kWholeWarp,
                              length + lane >= entries || ends(rows.columns[starts[0] + length + lane]));
      }
      length += ended != 0 ? __ffs(int(ended)) - 1 : 32;
      const float share = length < anchors ? rest[0] / float(anchors - length) : 0.0f;
      begin(t, length, share, prob[0]);
#pragma unroll 1
      for (int32_t j = lane; j < length; j += 32) {
        if (j != lane) {
          columns[0] = rows.columns[starts[0] + j];
          values[0] = rows.values[starts[0] + j];
        }
        visit(t, j, columns[0], values[0] - share, prob[0]);
      }
#pragma unroll
      for (int i = 0; i + 1 < kRowsInFlight; ++i) {
        columns[i] = columns[i + 1];
        values[i] = values[i + 1];
        rest[i] = rest[i + 1];
        prob[i] = prob[i + 1];
        starts[i] = starts[i + 1];
      }
    }
  }
}

// Asks for a token's row before it is needed; nothing waits for it.
__device__ __forceinline__ void prefetch_row(const RelativeRows& rows, int32_t token) {
  if (token < 0 || token >= rows.vocab) return;
  const int64_t start = token * rows.entries;
#pragma unroll 1
  for (int32_t j = 0; j < rows.entries; j += 32) {
    prefetch_l2(rows.columns + start + j);
    prefetch_l2(rows.values + start + j);
  }
  prefetch_l2(rows.rest + token);
}

// visit(t, e) by one lane for each entry e of candidates first <= t < end, a warp a candidate.
template <class Number, class Visit>
__device__ __forceinline__ void for_each_kept(const AnchorIndex<Number>& index, int32_t first, int32_t end,
                                              Visit visit) {
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
#pragma unroll 1
  for (int32_t t = first + warp; t < end; t += kSearchWarps) {
#pragma unroll 1
    for (int32_t j = lane; j < index.lengths[t]; j += 32) visit(t, t * index.pitch + j);
  }
}

// No anchor is named. A barrier must follow.
template <class Number>
__device__ __forceinline__ void clear_named(const AnchorIndex<Number>& index) {
#pragma unroll 1
  for (int32_t w = int32_t(threadIdx.x); w < index.named_words; w += kSearchThreads) index.named[w] = 0;
}

// The named anchor's number, or -1 if no candidate names it.
template <class Number>
__device__ __forceinline__ int32_t find(const AnchorIndex<Number>& index, int32_t column) {
  const uint32_t named = index.named[column / 32], bit = 1u << (column % 32);
  return (named & bit) == 0 ? -1 : index.before[column / 32] + __popc(named & (bit - 1));
}

// to[number] = from[column] for each named anchor. A thread has several words of bits, and loads for each at
// once: one after the other they would take longer than the search.
template <class Number>
__device__ __forceinline__ void gather_named(const AnchorIndex<Number>& index, const float* from, float* to) {
  constexpr int kAtOnce = 4;
#pragma unroll 1
  for (int32_t first = int32_t(threadIdx.x); first < index.named_words; first += kAtOnce * kSearchThreads) {
    uint32_t left[kAtOnce], any = 0;
    int32_t number[kAtOnce];
#pragma unroll
    for (int q = 0; q < kAtOnce; ++q) {
      const int32_t word = first + q * kSearchThreads;
      left[q] = word < index.named_words ? index.named[word] : 0;
      number[q] = word < index.named_words ? index.before[word] : 0;
      any |= left[q];
    }
#pragma unroll 1
    while (any != 0) {
      float loaded[kAtOnce];
#pragma unroll
      for (int q = 0; q < kAtOnce; ++q) {
        const int32_t column = (first + q * kSearchThreads) * 32 + __ffs(int(left[q])) - 1;
        loaded[q] = left[q] != 0 ? from[column] : 0.0f;
      }
      any = 0;
#pragma unroll
      for (int q = 0; q < kAtOnce; ++q) {
        if (left[q] != 0) to[number[q]++] = loaded[q];
        left[q] &= left[q] - 1;
        any |= left[q];
      }
    }
  }
}

// Keeps the candidates' rows and numbers the anchors they name. `ids` were written and clear_named was called
// before the last barrier. Ends in a barrier.
template <class Number>
__device__ __forceinline__ void number_anchors(AnchorIndex<Number>& index, const RelativeRows& rows,
                                               const int32_t* ids, int32_t anchors, int32_t* scratch) {
  const float* const no_probs = nullptr;
  for_each_entry(
      rows, ids, no_probs, index.candidates, anchors,
      [&](int32_t t, int32_t length, float share, float) {
        if (threadIdx.x % 32 == 0) {
          index.lengths[t] = length;
          index.uniform[t] = share;
        }
      },
      [&](int32_t t, int32_t j, int32_t column, float excess, float) {
        const int32_t e = t * index.pitch + j;
        index.columns[e] = column;
        index.excess[e] = excess;
        const uint32_t bit = 1u << (column % 32);
        const volatile uint32_t* const word = &index.named[column / 32];
        if ((*word & bit) == 0) atomicOr(&index.named[column / 32], bit);
      });
  __syncthreads();

  const int32_t each = odd_share(index.named_words);
  const int32_t begin = min(int32_t(threadIdx.x) * each, index.named_words);
  const int32_t end = min(begin + each, index.named_words);
  int32_t own = 0;
#pragma unroll 4
  for (int32_t w = begin; w < end; ++w) own += __popc(index.named[w]);
  int32_t before = block_exclusive_sum(own, &index.touched, scratch);
#pragma unroll 4
  for (int32_t w = begin; w < end; ++w) {
    index.before[w] = Number(before);
    before += __popc(index.named[w]);
  }
  __syncthreads();
  for_each_kept(index, 0, index.candidates,
                [&](int32_t, int32_t e) { index.numbers[e] = Number(find(index, index.columns[e])); });
  __syncthreads();
}

// Groups the entries by anchor, by candidate within each. What find() needs is gone after this. Begins and
// ends in a barrier.
template <class Number>
__device__ __forceinline__ void group_entries(AnchorIndex<Number>& index, GroupSum<Number>* scratch) {
  constexpr int kMaxWords = 4;
  const int32_t thread = int32_t(threadIdx.x), touched = index.touched, candidates = index.candidates;
  // Most often all candidates fit one pass.
  const int32_t wanted = min((candidates + 31) / 32, kMaxWords);
  const int32_t words = touched > 0 ? min(wanted, index.bits_room / touched) : wanted;
  const int32_t in_pass = 32 * words;
  const bool once = candidates <= in_pass;
  const auto mark = [&](int32_t first, int32_t end) {
#pragma unroll 1
    for (int32_t i = thread; i < touched * words; i += kSearchThreads) index.bits[i] = 0;
    __syncthreads();
    for_each_kept(index, first, end, [&](int32_t t, int32_t e) {
      atomicOr(&index.bits[(t - first) / 32 * touched + index.numbers[e]], 1u << ((t - first) % 32));
    });
    __syncthreads();
  };
  // Of the first `end` words of an anchor.
  const auto marked = [&](int32_t a, int32_t end) {
    int32_t count = 0;
#pragma unroll
    for (int32_t w = 0; w < kMaxWords; ++w)
      if (w < end) count += __popc(index.bits[w * touched + a]);
    return count;
  };

  __syncthreads();
  // Of several passes each goes on where the one before ended: starts[a + 1] holds where, and is then right
  // for the next anchor.
  Number* const next = index.starts + (once ? 0 : 1);
  if (once) {
    mark(0, candidates);
  } else {
#pragma unroll 1
    for (int32_t a = thread; a < touched; a += kSearchThreads) next[a] = 0;
#pragma unroll 1
    for (int32_t first = 0; first < candidates; first += in_pass) {
      mark(first, min(first + in_pass, candidates));
#pragma unroll 1
      for (int32_t a = thread; a < touched; a += kSearchThreads) next[a] += Number(marked(a, words));
      __syncthreads();
    }
  }

  const int32_t each = odd_share(touched);
  const int32_t begin = min(thread * each, touched), end = min(begin + each, touched);
  GroupSum<Number> own = 0, all;
#pragma unroll 1
  for (int32_t a = begin; a < end; ++a) {
    const int32_t count = once ? marked(a, words) : int32_t(next[a]);
    next[a] = Number(count);
    own += GroupSum<Number>(count) + (count > 1 ? kOneShared<Number> : 0);
  }
  const GroupSum<Number> before = block_exclusive_sum(own, &all, scratch);
  int32_t start = int32_t(before % kOneShared<Number>), shared = int32_t(before / kOneShared<Number>);
  index.shared_count = int32_t(all / kOneShared<Number>);
#pragma unroll 1
  for (int32_t a = begin; a < end; ++a) {
    const int32_t count = next[a];
    next[a] = Number(start);
    start += count;
    if (count > 1) index.shared[shared++] = Number(a);
  }
  if (thread == 0) index.starts[once ? touched : 0] = once ? Number(all % kOneShared<Number>) : Number(0);
  __syncthreads();

#pragma unroll 1
  for (int32_t first = 0; first < candidates; first += in_pass) {
    const int32_t last = min(first + in_pass, candidates);
    if (!once) mark(first, last);
    for_each_kept(index, first, last, [&](int32_t t, int32_t e) {
      const int32_t a = index.numbers[e], word = (t - first) / 32;
      const uint32_t below = (1u << ((t - first) % 32)) - 1;
      const int32_t to = next[a] + marked(a, word) + __popc(index.bits[word * touched + a] & below);
      index.group_candidates[to] = Number(t);
      index.group_excess[to] = index.excess[e];
    });
    __syncthreads();
    if (once) break;
#pragma unroll 1
    for (int32_t a = thread; a < touched; a += kSearchThreads) next[a] += Number(marked(a, words));
    __syncthreads();
  }
}

// visit(a, sum over the anchor's entries of probs[t] * excess) for each anchor, by one thread, always the
// same.
template <class Number, class Visit>
__device__ __forceinline__ void sum_by_anchor(const AnchorIndex<Number>& index, const float* probs,
                                              Visit visit) {
  const int32_t thread = int32_t(threadIdx.x);
  const auto term = [&](int32_t i) { return probs[index.group_candidates[i]] * index.group_excess[i]; };
#pragma unroll 1
  for (int32_t first = 0; first < index.shared_count; first += kSearchThreads / kSharedLanes) {
    const int32_t place = first + thread / kSharedLanes;
    const int32_t a = place < index.shared_count ? int32_t(index.shared[place]) : -1;
    const int32_t end = a < 0 ? 0 : int32_t(index.starts[a + 1]);
    float sum = 0.0f;
#pragma unroll 2
    for (int32_t i = a < 0 ? 0 : index.starts[a] + thread % kSharedLanes; i < end; i += kSharedLanes)
      sum += term(i);
#pragma unroll
    for (int distance = kSharedLanes / 2; distance > 0; distance /= 2)
      sum += __shfl_xor_sync(kWholeWarp, sum, distance);
    if (a >= 0 && thread % kSharedLanes == 0) visit(a, sum);
  }
#pragma unroll 2
  for (int32_t a = thread; a < index.touched; a += kSearchThreads) {
    const int32_t start = index.starts[a];
    if (index.starts[a + 1] == start + 1) visit(a, term(start));
  }
}

}  // namespace deepen
