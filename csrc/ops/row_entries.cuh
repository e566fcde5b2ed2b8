// The entries of several tokens' relative rows, read by one block: eight lanes a row, four entries a lane, so
// that all rows of a usual step are under way at once.
#pragma once

#include <cstdint>

#include "core/block_reduce.cuh"
#include "core/cuda.h"
#include "ops/relative_map.h"

namespace deepen {

constexpr int kSearchThreads = 1024;
constexpr int kSearchWarps = kSearchThreads / 32;
constexpr int kRowLanes = 8;  // lanes that share a relative row, four entries each at a time
constexpr int kRowChunk = 4 * kRowLanes;

// Four neighbours in one access: in shared memory, one after the other would meet the same banks. `at` is
// aligned to four.
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
__device__ __forceinline__ Four<T> load_four(const T* row, int32_t j, int32_t entries, T none) {
  Four<T> four{{none, none, none, none}};
  if (entries % 4 == 0 && reinterpret_cast<uintptr_t>(row) % 16 == 0) {
    if (j < entries) four = get_four(row + j);
    return four;
  }
#pragma unroll
  for (int q = 0; q < 4; ++q)
    if (j + q < entries) four.of[q] = row[j + q];
  return four;
}

// begin(t, part, length, share, prob) by each of a row's kRowLanes lanes. Then visit(t, j, count, columns,
// excess, prob) by one of them for each four entries from j on, of which `count` are there. prob is probs[t],
// or 0 where probs is null. A token outside the vocabulary (of a row whose top-k failed) has no entries. A
// column that is no anchor ends a row, as -1 does.
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
    // Most rows are one chunk, which stays in registers.
    Four<float> values = load_four(rows.values + start, 4 * part, own, 0.0f);
    Four<int32_t> columns{};
    int32_t length = 0;
#pragma unroll 1
    for (int32_t chunk = 0;; chunk += kRowChunk) {
      columns = load_four(rows.columns + start, chunk + 4 * part, own, -1);
      int32_t valid = 0;
#pragma unroll
      for (int q = 0; q < 4; ++q)
        if (valid == q && uint32_t(columns.of[q]) < uint32_t(anchors)) ++valid;
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
        columns = load_four(rows.columns + start, j, own, -1);
        values = load_four(rows.values + start, j, own, 0.0f);
      }
      const int32_t here = min(4, length - j);
#pragma unroll
      for (int q = 0; q < 4; ++q) values.of[q] = q < here ? values.of[q] - share : 0.0f;
      visit(t, j, here, columns, values, prob);
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

}  // namespace deepen
