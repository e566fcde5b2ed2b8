// The anchors that a row's candidates name, numbered on the device, and their entries grouped by anchor.
//
// Run to run the bits must be the same, so nothing may depend on which thread came first. Threads race for
// the slots of a hash table, but an anchor's number is its rank by the first entry (in candidate order) that
// names it: integer atomicMin, then a scan. Every sum over anchors runs by number and every sum over an
// anchor's entries by candidate, so the order is the data's own. Entries are grouped by counting, not by
// sorting: each anchor has one bit for each of 32 * words candidates of a pass, and an entry's rank within
// its anchor is the number of bits below its own. Fixed-point atomics for r would need no groups, but two
// shared-memory atomics an entry in each of T iterations instead of one such pass, and lose the digits of
// small r.
#pragma once

#include <cstdint>

#include "core/block_reduce.cuh"
#include "core/cuda.h"
#include "ops/relative_map.h"

namespace deepen {

constexpr int kSearchThreads = 512;
constexpr int kSearchWarps = kSearchThreads / 32;
constexpr int kRowsInFlight = 8;  // relative rows that a warp loads at once
constexpr int32_t kNoEntry = INT32_MIN;

struct AnchorIndex {
  int32_t candidates;
  int32_t pitch;  // entry j of candidate t is at t * pitch + j
  int32_t touched;
  int32_t* lengths;  // [candidates] entries of each
  float* uniform;    // [candidates] u_t
  int32_t* numbers;  // [candidates * pitch] the entry's anchor
  float* excess;     // [candidates * pitch] value - u_t

  // Hash table, until group_entries.
  int32_t* slot_columns;  // [capacity] -1 if free
  int32_t* slot_numbers;  // [capacity] first entry, then the anchor's number
  int32_t capacity;       // a power of two, at least twice the anchors
  int32_t shift;          // 32 - log2(capacity)

  // Entries by anchor, from group_entries on (in the hash table's memory).
  int32_t* offsets;           // [touched + 1]
  int32_t* group_candidates;  // [entries]
  float* group_excess;        // [entries]
  int32_t* ranks;             // [candidates * pitch] scratch
  uint32_t* bits;             // [words * touched] scratch
  int32_t words;
};

// Sums of two values over the block; every thread gets the same bits. One barrier: `scratch` (kMaxWarps) must
// not be used again before the next one.
__device__ __forceinline__ float2 block_sum(float2 value, float2* scratch) {
  value.x = warp_reduce(value.x, Plus{});
  value.y = warp_reduce(value.y, Plus{});
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  const int lane = int(threadIdx.x) % 32;
  value = lane < kSearchWarps ? scratch[lane] : make_float2(0.0f, 0.0f);
  return make_float2(warp_reduce(value.x, Plus{}), warp_reduce(value.y, Plus{}));
}

// The sum of the threads' values below this one, and of all. One barrier, as above.
__device__ __forceinline__ int32_t block_exclusive_sum(int32_t value, int32_t* total, int32_t* scratch) {
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  int32_t inclusive = value;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int32_t below = __shfl_up_sync(kWholeWarp, inclusive, distance);
    if (lane >= distance) inclusive += below;
  }
  if (lane == 31) scratch[warp] = inclusive;
  __syncthreads();
  const int32_t other = lane < kSearchWarps ? scratch[lane] : 0;
  *total = warp_reduce(other, Plus{});
  return inclusive - value + warp_reduce(lane < warp ? other : 0, Plus{});
}

// begin(t, length, share) by every lane of the warp that has candidate t, then visit(t, j, column, excess) by
// one lane for each of its entries. Loads of several rows are in flight at once. A token outside the
// vocabulary (of a row whose top-k failed) has no entries; a column that is no anchor ends a row, as -1 does.
template <class Begin, class Visit>
__device__ __forceinline__ void for_each_entry(const RelativeRows& rows, const int32_t* ids, int32_t count,
                                               int64_t anchors, Begin begin, Visit visit) {
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const auto ends = [anchors](int32_t column) { return uint32_t(column) >= uint32_t(anchors); };
  for (int32_t first = warp; first < count; first += kSearchWarps * kRowsInFlight) {
    int32_t columns[kRowsInFlight];
    float values[kRowsInFlight], rest[kRowsInFlight];
    int64_t starts[kRowsInFlight];
#pragma unroll
    for (int i = 0; i < kRowsInFlight; ++i) {
      const int32_t t = first + i * kSearchWarps;
      const int64_t token = t < count ? ids[t] : -1;
      const bool known = token >= 0 && token < rows.vocab;
      starts[i] = known ? token * rows.entries : -1;
      const bool loads = known && lane < rows.entries;
      columns[i] = loads ? rows.columns[starts[i] + lane] : -1;
      values[i] = loads ? rows.values[starts[i] + lane] : 0.0f;
      rest[i] = known ? rows.rest[token] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kRowsInFlight; ++i) {
      const int32_t t = first + i * kSearchWarps;
      if (t >= count) break;
      uint32_t ended = __ballot_sync(kWholeWarp, ends(columns[i]));
      int64_t length = 0;
      while (ended == 0 && length + 32 < rows.entries) {
        length += 32;
        const bool inside = length + lane < rows.entries;
        ended = __ballot_sync(kWholeWarp, !inside || ends(rows.columns[starts[i] + length + lane]));
      }
      length += ended != 0 ? __ffs(int(ended)) - 1 : 32;
      const float share = length < anchors ? rest[i] / float(anchors - length) : 0.0f;
      begin(t, int32_t(length), share);
      if (lane < length) visit(t, lane, columns[i], values[i] - share);
      for (int64_t j = lane + 32; j < length; j += 32) {
        visit(t, int32_t(j), rows.columns[starts[i] + j], rows.values[starts[i] + j] - share);
      }
    }
  }
}

__device__ __forceinline__ uint32_t first_slot(const AnchorIndex& index, int32_t column) {
  return (uint32_t(column) * 2654435769u) >> index.shift;
}

__device__ __forceinline__ int32_t insert(const AnchorIndex& index, int32_t column) {
  uint32_t slot = first_slot(index, column);
  while (true) {
    const int32_t found = atomicCAS(&index.slot_columns[slot], -1, column);
    if (found == -1 || found == column) return int32_t(slot);
    slot = (slot + 1) & uint32_t(index.capacity - 1);
  }
}

// The anchor's number, or -1 if no candidate names it.
__device__ __forceinline__ int32_t find(const AnchorIndex& index, int32_t column) {
  uint32_t slot = first_slot(index, column);
  while (true) {
    const int32_t found = index.slot_columns[slot];
    if (found == column) return index.slot_numbers[slot];
    if (found == -1) return -1;
    slot = (slot + 1) & uint32_t(index.capacity - 1);
  }
}

// Loads the candidates' rows and numbers the anchors they name. `ids` were written before the last barrier.
__device__ __forceinline__ void number_anchors(AnchorIndex& index, const RelativeRows& rows,
                                               const int32_t* ids, int64_t anchors, int32_t* scratch) {
  const int32_t entries = index.candidates * index.pitch;
  for (int32_t slot = int32_t(threadIdx.x); slot < index.capacity; slot += kSearchThreads) {
    index.slot_columns[slot] = -1;
    index.slot_numbers[slot] = INT32_MAX;
  }
  for (int32_t e = int32_t(threadIdx.x); e < entries; e += kSearchThreads) index.numbers[e] = kNoEntry;
  __syncthreads();
  for_each_entry(
      rows, ids, index.candidates, anchors,
      [&](int32_t t, int32_t length, float share) {
        if (threadIdx.x % 32 == 0) {
          index.lengths[t] = length;
          index.uniform[t] = share;
        }
      },
      [&](int32_t t, int32_t j, int32_t column, float excess) {
        const int32_t e = t * index.pitch + j;
        const int32_t slot = insert(index, column);
        atomicMin(&index.slot_numbers[slot], e);
        index.numbers[e] = slot;
        index.excess[e] = excess;
      });
  __syncthreads();

  // An anchor's first entry gives it its number; it is marked by the complement of its slot.
  const int32_t each = (entries + kSearchThreads - 1) / kSearchThreads;
  const int32_t begin = min(int32_t(threadIdx.x) * each, entries), end = min(begin + each, entries);
  int32_t firsts = 0;
  for (int32_t e = begin; e < end; ++e) {
    const int32_t slot = index.numbers[e];
    if (slot == kNoEntry || index.slot_numbers[slot] != e) continue;
    index.numbers[e] = ~slot;
    ++firsts;
  }
  int32_t number = block_exclusive_sum(firsts, &index.touched, scratch);
  for (int32_t e = begin; e < end; ++e) {
    const int32_t slot = ~index.numbers[e];
    if (slot >= 0 && slot < index.capacity) index.slot_numbers[slot] = number++;
  }
  __syncthreads();
  for (int32_t e = int32_t(threadIdx.x); e < entries; e += kSearchThreads) {
    const int32_t mark = index.numbers[e];
    if (mark != kNoEntry) index.numbers[e] = index.slot_numbers[mark < 0 ? ~mark : mark];
  }
  __syncthreads();
}

// Groups the entries by anchor, by candidate within each; the hash table is gone after this. The last barrier
// comes after the last use of the hash table, and another one at the end.
__device__ __forceinline__ void group_entries(const AnchorIndex& index, int32_t* scratch) {
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int32_t touched = index.touched, in_pass = 32 * index.words;
  for (int32_t a = int32_t(threadIdx.x); a < touched; a += kSearchThreads) index.offsets[a] = 0;
  for (int32_t i = int32_t(threadIdx.x); i < touched * index.words; i += kSearchThreads) index.bits[i] = 0;
  __syncthreads();
  for (int32_t first = 0; first < index.candidates; first += in_pass) {
    const int32_t end = min(first + in_pass, index.candidates);
    for (int32_t t = first + warp; t < end; t += kSearchWarps) {
      uint32_t* const bits = index.bits + int64_t((t - first) / 32) * touched;
      for (int32_t j = lane; j < index.lengths[t]; j += 32) {
        atomicOr(&bits[index.numbers[t * index.pitch + j]], 1u << ((t - first) % 32));
      }
    }
    __syncthreads();
    for (int32_t t = first + warp; t < end; t += kSearchWarps) {
      const int32_t word = (t - first) / 32;
      const uint32_t below = (1u << ((t - first) % 32)) - 1;
      for (int32_t j = lane; j < index.lengths[t]; j += 32) {
        const int32_t e = t * index.pitch + j, a = index.numbers[e];
        int32_t rank = index.offsets[a];
        for (int32_t w = 0; w < word; ++w) rank += __popc(index.bits[int64_t(w) * touched + a]);
        index.ranks[e] = rank + __popc(index.bits[int64_t(word) * touched + a] & below);
      }
    }
    __syncthreads();
    for (int32_t a = int32_t(threadIdx.x); a < touched; a += kSearchThreads) {
      int32_t count = index.offsets[a];
      for (int32_t w = 0; w < index.words; ++w) {
        count += __popc(index.bits[int64_t(w) * touched + a]);
        index.bits[int64_t(w) * touched + a] = 0;
      }
      index.offsets[a] = count;
    }
    __syncthreads();
  }

  const int32_t each = (touched + kSearchThreads - 1) / kSearchThreads;
  const int32_t begin = min(int32_t(threadIdx.x) * each, touched), end = min(begin + each, touched);
  int32_t count = 0, all;
  for (int32_t a = begin; a < end; ++a) count += index.offsets[a];
  int32_t offset = block_exclusive_sum(count, &all, scratch);
  for (int32_t a = begin; a < end; ++a) {
    const int32_t here = index.offsets[a];
    index.offsets[a] = offset;
    offset += here;
  }
  if (threadIdx.x == 0) index.offsets[touched] = all;
  __syncthreads();
  for (int32_t t = warp; t < index.candidates; t += kSearchWarps) {
    for (int32_t j = lane; j < index.lengths[t]; j += 32) {
      const int32_t e = t * index.pitch + j;
      const int32_t to = index.offsets[index.numbers[e]] + index.ranks[e];
      index.group_candidates[to] = t;
      index.group_excess[to] = index.excess[e];
    }
  }
  __syncthreads();
}

}  // namespace deepen
