// The candidates' entries by anchor, and sums over them: see anchor_index.cuh.
#pragma once

#include <cstdint>

#include "core/block_reduce.cuh"
#include "core/cuda.h"
#include "ops/anchor_index.cuh"

namespace deepen {

constexpr int kShortEntries = 4;  // a shared anchor with more is long
constexpr int kLongLanes = 8;     // lanes that sum a long anchor's entries

// Groups the entries by anchor, by candidate within each. What find() needs is gone after this. Begins and
// ends in a barrier. Of an anchor that a candidate's row names twice, which no row should, one entry is left:
// the anchor has one bit for the candidate.
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
    float sum = term(start);  // the only one where a row names the anchor twice, and no other row does
#pragma unroll
    for (int32_t i = 1; i < kShortEntries; ++i)
      if (i < count) sum += term(start + i);
    visit(index.single + a, sum);
  }
#pragma unroll 4
  for (int32_t a = thread; a < index.single; a += kSearchThreads) visit(a, term(a));
}

}  // namespace deepen
