// The anchors that a row's candidates name, numbered on the device, and their entries grouped by anchor.
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

namespace deepen {

constexpr int kSearchThreads = 1024;
constexpr int kSearchWarps = kSearchThreads / 32;
constexpr int kRowLanes = 8;  // lanes that share a relative row, four entries each at a time
constexpr int kRowChunk = 4 * kRowLanes;
constexpr int kShortEntries = 4;  // a shared anchor with more is long
constexpr int kLongLanes = 8;     // lanes that sum a long anchor's entries

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
  uint64_t* several;  // [words] and for each that several candidates name
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

// Four neighbours in shared memory at once, each a thread's own: one after the other would meet the same
// banks. `at` is aligned to four.
template <class T>
struct alignas(4 * sizeof(T)) Four {
  T of[4];
};
template <class T>
__device__ __forceinline__ Four<T> get_four(const T* at) {
  return *reinterpret_cast<const Four<T>*>(at);
}
template <class T>
__device__ __forceinline__ void put_four(T* at, const Four<T>& four) {
  *reinterpret_cast<Four<T>*>(at) = four;
}

// Four neighbours of a row, from entry j on; what is past the row's end is `none`.
template <class T>
__device__ __forceinline__ void load_four(const T* row, int32_t j, int32_t entries, T none, T (&four)[4]) {
  if (entries % 4 == 0 && reinterpret_cast<uintptr_t>(row) % 16 == 0) {
    Four<T> whole{{none, none, none, none}};
    if (j < entries) whole = get_four(row + j);
#pragma unroll
    for (int q = 0; q < 4; ++q) four[q] = whole.of[q];
    return;
  }
#pragma unroll
  for (int q = 0; q < 4; ++q) four[q] = j + q < entries ? row[j + q] : none;
}

// begin(t, part, length, share, prob) by each of a row's kRowLanes lanes, then visit(t, j, column, excess,
// prob) by one of them for each of its entries; prob is probs[t], or 0 where probs is null. A token outside
// the vocabulary (of a row whose top-k failed) has no entries; a column that is no anchor ends a row, as -1
// does.
template <class Begin, class Visit>
__device__ __forceinline__ void for_each_entry(const RelativeRows& rows, const int32_t* ids,
                                               const float* probs, int32_t count, int32_t anchors,
                                               Begin begin, Visit visit) {
  const int32_t part = int32_t(threadIdx.x) % kRowLanes, before = int32_t(threadIdx.x) % 32 - part;
  const int32_t entries = int32_t(rows.entries), vocab = int32_t(rows.vocab);
#pragma unroll 1
  for (int32_t first = 0; first < count; first += kSearchThreads / kRowLanes) {
    const int32_t t = first + int32_t(threadIdx.x) / kRowLanes, token = t < count ? ids[t] : -1;
    const bool known = uint32_t(token) < uint32_t(vocab);
    const int64_t start = known ? int64_t(token) * entries : 0;
    const int32_t own = known ? entries : 0;  // as many as there are to be read
    const float rest = known ? rows.rest[token] : 0.0f;
    const float prob = probs != nullptr && t < count ? probs[t] : 0.0f;
    int32_t columns[4], length = 0;
    float values[4];
    // Most rows are one chunk, which stays in registers.
    load_four(rows.values + start, 4 * part, own, 0.0f, values);
#pragma unroll 1
    for (int32_t chunk = 0;; chunk += kRowChunk) {
      load_four(rows.columns + start, chunk + 4 * part, own, -1, columns);
      int32_t valid = 0;
#pragma unroll
      for (int q = 0; q < 4; ++q)
        if (valid == q && uint32_t(columns[q]) < uint32_t(anchors)) ++valid;
      const uint32_t ended = __ballot_sync(kWholeWarp, valid < 4) >> before & ((1u << kRowLanes) - 1);
      const int32_t last = ended != 0 ? __ffs(int(ended)) - 1 : kRowLanes - 1;
      const int32_t there = __shfl_sync(kWholeWarp, valid, before + last);
      if (length == chunk) length += 4 * last + there;
      if (__all_sync(kWholeWarp, length < chunk + kRowChunk || length >= own)) break;
    }
    const float share = known && length < anchors ? rest / float(anchors - length) : 0.0f;
    if (t < count) begin(t, part, length, share, prob);
#pragma unroll 1
    for (int32_t chunk = 0; chunk + 4 * part < length; chunk += kRowChunk) {
      const int32_t j = chunk + 4 * part;
      if (entries > kRowChunk) {
        load_four(rows.columns + start, j, own, -1, columns);
        load_four(rows.values + start, j, own, 0.0f, values);
      }
      const int32_t count = min(4, length - j);
#pragma unroll
      for (int q = 0; q < 4; ++q) values[q] = q < count ? values[q] - share : 0.0f;
      visit(t, j, count, columns, values, prob);
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

// By any number of threads at once.
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

// to[number] = from[column] for each named anchor.
template <class Number>
__device__ __forceinline__ void gather_named(const AnchorIndex<Number>& index, const float* from, float* to) {
  // Several loads under way: one after the other they would take longer than the search.
#pragma unroll 4
  for (int32_t column = int32_t(threadIdx.x); column < 64 * index.words; column += kSearchThreads) {
    const int32_t number = find(index, column);
    if (number >= 0) to[number] = from[column];
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
      [&](int32_t t, int32_t j, int32_t count, const int32_t (&columns)[4], const float (&excess)[4], float) {
        const int32_t e = t * index.pitch + j;
        put_four(index.columns + e, Four<int32_t>{{columns[0], columns[1], columns[2], columns[3]}});
        put_four(index.excess + e, Four<float>{{excess[0], excess[1], excess[2], excess[3]}});
#pragma unroll
        for (int q = 0; q < 4; ++q)
          if (q < count) name(index, columns[q]);
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

// Groups the entries by anchor, by candidate within each. What find() needs is gone after this. Begins and
// ends in a barrier.
template <class Number>
__device__ __forceinline__ void group_entries(AnchorIndex<Number>& index, TwoCounts<Number>* scratch,
                                              int32_t* entry_scratch) {
  constexpr int kMaxWords = 4;
  const int32_t thread = int32_t(threadIdx.x), candidates = index.candidates;
  const int32_t single = index.single, shared = index.touched - single;
  // Most often all candidates fit one pass.
  const int32_t wanted = min((candidates + 31) / 32, kMaxWords);
  const int32_t words = shared > 0 ? min(wanted, index.bits_room / shared) : wanted;
  const int32_t in_pass = 32 * words;
  const bool once = candidates <= in_pass;
  const auto mark = [&](int32_t first, int32_t end) {
#pragma unroll 1
    for (int32_t i = thread; i < shared * words; i += kSearchThreads) index.bits[i] = 0;
    __syncthreads();
    for_each_kept(index, first, end, [&](int32_t t, int32_t e, int32_t count) {
      const Four<Number> numbers = get_four(index.numbers + e);
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const int32_t a = int32_t(numbers.of[q]) - single;
        if (q < count && a >= 0)
          atomicOr(&index.bits[(t - first) / 32 * shared + a], 1u << ((t - first) % 32));
      }
    });
    __syncthreads();
  };
  // Of the first `end` words of a shared anchor.
  const auto marked = [&](int32_t a, int32_t end) {
    int32_t count = 0;
#pragma unroll
    for (int32_t w = 0; w < kMaxWords; ++w)
      if (w < end) count += __popc(index.bits[w * shared + a]);
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
    for (int32_t a = thread; a < shared; a += kSearchThreads) next[a] = 0;
#pragma unroll 1
    for (int32_t first = 0; first < candidates; first += in_pass) {
      mark(first, min(first + in_pass, candidates));
#pragma unroll 1
      for (int32_t a = thread; a < shared; a += kSearchThreads) next[a] += Number(marked(a, words));
      __syncthreads();
    }
  }

  const int32_t each = odd_share(shared);
  const int32_t begin = min(thread * each, shared), end = min(begin + each, shared);
  int32_t entries = 0, all_entries;
  TwoCounts<Number> kinds = 0, all_kinds;  // short and long anchors
#pragma unroll 1
  for (int32_t a = begin; a < end; ++a) {
    const int32_t count = once ? marked(a, words) : int32_t(next[a]);
    next[a] = Number(count);
    entries += count;
    kinds += count > kShortEntries ? kSecond<Number> : 1;
  }
  int32_t start = single + block_exclusive_sum(entries, &all_entries, entry_scratch);
  kinds = block_exclusive_sum(kinds, &all_kinds, scratch);
  index.short_count = int32_t(all_kinds % kSecond<Number>);
  index.long_count = int32_t(all_kinds / kSecond<Number>);
#pragma unroll 1
  for (int32_t a = begin; a < end; ++a) {
    const int32_t count = next[a];
    next[a] = Number(start);
    start += count;
    if (count > kShortEntries) {
      index.long_anchors[kinds / kSecond<Number>] = Number(a);
      kinds += kSecond<Number>;
    } else {
      index.short_anchors[kinds % kSecond<Number>] = Number(a);
      kinds += 1;
    }
  }
  if (thread == 0) index.starts[once ? shared : 0] = Number(once ? single + all_entries : single);
  __syncthreads();

#pragma unroll 1
  for (int32_t first = 0; first < candidates; first += in_pass) {
    const int32_t last = min(first + in_pass, candidates);
    if (!once) mark(first, last);
    const uint32_t* const bits = index.bits;
    for_each_kept(index, first, last, [&](int32_t t, int32_t e, int32_t count) {
      const Four<Number> numbers = get_four(index.numbers + e);
      const Four<float> excess = get_four(index.excess + e);
      const int32_t word = (t - first) / 32;
      const uint32_t below = (1u << ((t - first) % 32)) - 1;
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        if (q >= count) break;
        const int32_t number = numbers.of[q], a = number - single;
        const int32_t to =
            a < 0 ? number : next[a] + marked(a, word) + __popc(bits[word * shared + a] & below);
        index.group_candidates[to] = Number(t);
        index.group_excess[to] = excess.of[q];
      }
    });
    __syncthreads();
    if (once) break;
#pragma unroll 1
    for (int32_t a = thread; a < shared; a += kSearchThreads) next[a] += Number(marked(a, words));
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
  for (int32_t first = 0; first < index.long_count; first += kSearchThreads / kLongLanes) {
    const int32_t place = first + thread / kLongLanes;
    const int32_t a = place < index.long_count ? int32_t(index.long_anchors[place]) : -1;
    const int32_t end = a < 0 ? 0 : int32_t(index.starts[a + 1]);
    float sum = 0.0f;
#pragma unroll 2
    for (int32_t i = a < 0 ? 0 : index.starts[a] + thread % kLongLanes; i < end; i += kLongLanes)
      sum += term(i);
#pragma unroll
    for (int distance = kLongLanes / 2; distance > 0; distance /= 2)
      sum += __shfl_xor_sync(kWholeWarp, sum, distance);
    if (a >= 0 && thread % kLongLanes == 0) visit(index.single + a, sum);
  }
  // From the last thread on, because the first ones had most of the long anchors.
#pragma unroll 1
  for (int32_t place = kSearchThreads - 1 - thread; place < index.short_count; place += kSearchThreads) {
    const int32_t a = index.short_anchors[place], start = index.starts[a];
    const int32_t count = index.starts[a + 1] - start;
    float sum = term(start) + term(start + 1);
#pragma unroll
    for (int32_t i = 2; i < kShortEntries; ++i)
      if (i < count) sum += term(start + i);
    visit(index.single + a, sum);
  }
#pragma unroll 4
  for (int32_t a = thread; a < index.single; a += kSearchThreads) visit(a, term(a));
}

}  // namespace deepen
