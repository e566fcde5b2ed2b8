// The search over one row by one block, shared by inverse_search.cu and fuse.cu: where its arrays lie, and T
// AdamW steps over them. The arrays are in shared memory if they fit, else in the caller's workspace: the
// same code, the same bits.
//
// One step over sparse rows (K candidates of m entries) is two gathers: r by anchor over the grouped entries,
// h by candidate over the row's own; K = 128, m = 32: 4,096 multiply-adds each, all from shared memory, and
// four barriers. Over dense rows it reads K * |A| floats twice.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/check.h"
#include "core/column_index.h"
#include "core/cuda.h"
#include "ops/adamw.h"
#include "ops/anchor_index.cuh"
#include "ops/relative_map.h"

namespace deepen {

constexpr size_t kStaticSharedBytes = 2048;  // more than the kernels' own

// By value: a kernel argument.
struct SearchSchedule {
  AdamStep steps[kMaxSearchSteps];
  int32_t count;
};

static inline SearchSchedule search_schedule(const AdamStep* steps, int32_t count) {
  SearchSchedule schedule{};
  for (int32_t i = 0; i < count; ++i) schedule.steps[i] = steps[i];
  schedule.count = count;
  return schedule;
}

// Offsets in bytes of a row's arrays.
struct SearchLayout {
  size_t ids, logits, probs, pull, first, second;  // [candidates]
  size_t lengths, uniform;                         // [candidates], sparse
  size_t numbers, excess;                          // [candidates * pitch], sparse
  size_t target;                                   // [width]
  size_t relative;                                 // [width], sparse: shares its memory with ranks
  size_t slot_columns, slot_numbers;               // [capacity]; then, in the same memory:
  size_t offsets, group_candidates, group_excess;
  size_t mass;  // [2 * width] fixed-point target; then bits [words * width]
  size_t bytes;
  int32_t pitch, width, capacity, shift, words;
};

static inline size_t reserve(size_t* used, int64_t count) {
  const size_t start = *used;
  *used += (size_t(count) * 4 + 15) / 16 * 16;
  return start;
}

// `words` * 32 candidates are grouped in one pass.
static inline SearchLayout search_layout_with(const RelativeRows& rows, int64_t candidates, int64_t anchors,
                                              int32_t words) {
  DEEPEN_CHECK(anchors < (1 << 30), "there are ", anchors, " anchors; a CUDA search takes up to 2^30");
  SearchLayout layout{};
  size_t used = 0;
  for (size_t* array : {&layout.ids, &layout.logits, &layout.probs, &layout.pull, &layout.first,
                        &layout.second, &layout.lengths, &layout.uniform}) {
    *array = reserve(&used, candidates);
  }
  if (is_dense(rows)) {
    layout.width = int32_t(anchors);
    layout.target = reserve(&used, anchors);
    layout.relative = reserve(&used, anchors);
    layout.bytes = used;
    return layout;
  }
  // Eight candidates side by side (pull_sparse) then meet all 32 banks.
  const int64_t pitch = rows.entries % 32 == 0 ? rows.entries + 4 : rows.entries;
  const int64_t entries = candidates * pitch;
  DEEPEN_CHECK(entries < (1 << 29), "the search has ", candidates, " candidates with ", rows.entries,
               " entries; a CUDA search takes up to 2^29 entries a row");
  const int64_t named = candidates * rows.entries;
  layout.pitch = int32_t(pitch);
  layout.width = int32_t(named < anchors ? named : anchors);
  layout.capacity = column_index_capacity(layout.width);
  layout.shift = 32 - __builtin_ctz(uint32_t(layout.capacity));
  layout.words = words;
  layout.numbers = reserve(&used, entries);
  layout.excess = reserve(&used, entries);
  layout.target = reserve(&used, layout.width);
  layout.mass = reserve(&used, int64_t(layout.width) * (words > 2 ? words : 2));
  size_t early = used, late = used;
  layout.slot_columns = reserve(&early, layout.capacity);
  layout.slot_numbers = reserve(&early, layout.capacity);
  layout.offsets = reserve(&late, layout.width + 1);
  layout.group_candidates = reserve(&late, named);
  layout.group_excess = reserve(&late, named);
  layout.relative = reserve(&late, entries);
  layout.bytes = early > late ? early : late;
  return layout;
}

// The layout of the arrays in `shared_bytes` if they fit, else in the workspace (then larger than that).
static inline SearchLayout search_layout(const RelativeRows& rows, int64_t candidates, int64_t anchors,
                                         size_t shared_bytes) {
  const SearchLayout fast = search_layout_with(rows, candidates, anchors, 4);
  if (fast.bytes <= shared_bytes) return fast;
  const SearchLayout small = search_layout_with(rows, candidates, anchors, 2);
  return small.bytes <= shared_bytes ? small : fast;
}

// Rows of the workspace start at multiples of this.
static inline size_t search_row_bytes(const SearchLayout& layout) { return (layout.bytes + 127) / 128 * 128; }

struct SearchState {
  AnchorIndex index;  // of sparse rows
  int32_t candidates;
  int32_t* ids;  // -1 for one outside the vocabulary, as of a row whose top-k failed
  float *logits, *probs, *pull, *first, *second;
  float* target;    // [touched] or, with dense rows, [anchors]
  float* relative;  // likewise: target / r - 1
  uint32_t* mass;   // [2 * width] fuse's target as 64-bit integers, low words and high words
  float tail_logit;
  float target_outside;  // the target's mass on anchors no candidate names
};

struct SearchScratch {
  float largest[kMaxWarps];
  float2 sums[kMaxWarps], pulls[kMaxWarps], bases[kMaxWarps];
  int32_t firsts[kMaxWarps], groups[kMaxWarps];
  double inside[kMaxWarps];
};

__device__ __forceinline__ SearchState search_state(char* base, const SearchLayout& layout,
                                                    int32_t candidates) {
  SearchState row;
  row.candidates = row.index.candidates = candidates;
  row.ids = reinterpret_cast<int32_t*>(base + layout.ids);
  row.logits = reinterpret_cast<float*>(base + layout.logits);
  row.probs = reinterpret_cast<float*>(base + layout.probs);
  row.pull = reinterpret_cast<float*>(base + layout.pull);
  row.first = reinterpret_cast<float*>(base + layout.first);
  row.second = reinterpret_cast<float*>(base + layout.second);
  row.target = reinterpret_cast<float*>(base + layout.target);
  row.relative = reinterpret_cast<float*>(base + layout.relative);
  row.mass = reinterpret_cast<uint32_t*>(base + layout.mass);
  row.tail_logit = row.target_outside = 0.0f;
  AnchorIndex& index = row.index;
  index.pitch = layout.pitch;
  index.capacity = layout.capacity;
  index.shift = layout.shift;
  index.words = layout.words;
  index.touched = layout.width;  // of dense rows; number_anchors counts those of sparse rows
  index.lengths = reinterpret_cast<int32_t*>(base + layout.lengths);
  index.uniform = reinterpret_cast<float*>(base + layout.uniform);
  index.numbers = reinterpret_cast<int32_t*>(base + layout.numbers);
  index.excess = reinterpret_cast<float*>(base + layout.excess);
  index.slot_columns = reinterpret_cast<int32_t*>(base + layout.slot_columns);
  index.slot_numbers = reinterpret_cast<int32_t*>(base + layout.slot_numbers);
  index.offsets = reinterpret_cast<int32_t*>(base + layout.offsets);
  index.group_candidates = reinterpret_cast<int32_t*>(base + layout.group_candidates);
  index.group_excess = reinterpret_cast<float*>(base + layout.group_excess);
  index.ranks = reinterpret_cast<int32_t*>(base + layout.relative);
  index.bits = row.mass;
  return row;
}

// Keeps target / r finite where r underflows; there the true gradient is nil anyway.
constexpr float kSmallestRelative = 1e-30f;

// target / r - 1. Because a row's entries sum to 1, the 1 drops out of h_t - sum_s p_s h_s; leaving it out
// saves the digits it would cost where r is near the target.
__device__ __forceinline__ float relative_error(float target, float r) {
  r = fmaxf(r, kSmallestRelative);
  return (target - r) / r;
}

// relative = target / r - 1; returns this thread's part of its sum. probs hold exp(z - largest), `scale`
// turns them into probabilities, `base` is what every anchor gets alike.
__device__ __forceinline__ float relative_sparse(const SearchState& row, float scale, float base) {
  const AnchorIndex& index = row.index;
  float errors = 0.0f;
  for (int32_t a = int32_t(threadIdx.x); a < index.touched; a += kSearchThreads) {
    float r = 0.0f;
    const int32_t end = index.offsets[a + 1];
#pragma unroll 4
    for (int32_t i = index.offsets[a]; i < end; ++i)
      r += row.probs[index.group_candidates[i]] * index.group_excess[i];
    row.relative[a] = relative_error(row.target[a], base + scale * r);
    errors += row.relative[a];
  }
  return errors;
}

__device__ __forceinline__ float relative_dense(const SearchState& row, const RelativeRows& rows, float scale,
                                                float base) {
  float errors = 0.0f;
  for (int32_t a = int32_t(threadIdx.x); a < row.index.touched; a += kSearchThreads) {
    float r = 0.0f;
#pragma unroll 8
    for (int32_t t = 0; t < row.candidates; ++t)
      r += row.probs[t] * rows.values[int64_t(max(row.ids[t], 0)) * rows.entries + a];
    row.relative[a] = relative_error(row.target[a], base + scale * r);
    errors += row.relative[a];
  }
  return errors;
}

// h - 1 of all candidates into row.pull, without the uniform part; returns this thread's part of
// sum_t probs_t h_t. Four lanes a candidate.
__device__ __forceinline__ float pull_sparse(const SearchState& row) {
  const AnchorIndex& index = row.index;
  const int32_t part = int32_t(threadIdx.x) % 4;
  float pulled = 0.0f;
  for (int32_t first = 0; first < row.candidates; first += kSearchThreads / 4) {
    const int32_t t = first + int32_t(threadIdx.x) / 4;
    const int32_t length = t < row.candidates ? index.lengths[t] : 0;
    float h = 0.0f;
#pragma unroll 4
    for (int32_t j = part; j < length; j += 4)
      h += index.excess[t * index.pitch + j] * row.relative[index.numbers[t * index.pitch + j]];
    h += __shfl_xor_sync(kWholeWarp, h, 1);
    h += __shfl_xor_sync(kWholeWarp, h, 2);
    if (part == 0 && t < row.candidates) {
      row.pull[t] = h;
      pulled += row.probs[t] * h;
    }
  }
  return pulled;
}

// A warp a candidate.
__device__ __forceinline__ float pull_dense(const SearchState& row, const RelativeRows& rows) {
  const int lane = int(threadIdx.x) % 32;
  float pulled = 0.0f;
  for (int32_t t = int32_t(threadIdx.x) / 32; t < row.candidates; t += kSearchWarps) {
    const float* const values = rows.values + int64_t(max(row.ids[t], 0)) * rows.entries;
    float h = 0.0f;
#pragma unroll 8
    for (int32_t a = lane; a < row.index.touched; a += 32) h += values[a] * row.relative[a];
    h = warp_reduce(h, Plus{});
    if (lane == 0) {
      row.pull[t] = h;
      pulled += row.probs[t] * h;
    }
  }
  return pulled;
}

// T steps on row.logits. logits, target (and, with sparse rows, the groups) were written before the last
// barrier. A candidate's logit and moments belong to one thread, so they need none at the end of a step.
template <bool kDense>
__device__ __forceinline__ void search(const SearchState& row, const RelativeRows& rows, int64_t anchors,
                                       const SearchSchedule& schedule, SearchScratch* scratch) {
  const int32_t candidates = row.candidates, thread = int32_t(threadIdx.x);
  const float all = float(anchors), outside = float(anchors - row.index.touched);
  for (int32_t t = thread; t < candidates; t += kSearchThreads) row.first[t] = row.second[t] = 0.0f;
  for (int32_t step = 0; step < schedule.count; ++step) {
    float largest = row.tail_logit;
    for (int32_t t = thread; t < candidates; t += kSearchThreads) largest = fmaxf(largest, row.logits[t]);
    largest = warp_reduce(largest, Larger{});
    if (thread % 32 == 0) scratch->largest[thread / 32] = largest;
    __syncthreads();
    largest = warp_reduce(scratch->largest[thread % kSearchWarps], Larger{});

    float2 sums = make_float2(0.0f, 0.0f);  // of exp(z - largest), and of that times u
    for (int32_t t = thread; t < candidates; t += kSearchThreads) {
      const float e = expf(row.logits[t] - largest);
      row.probs[t] = e;
      sums.x += e;
      if (!kDense) sums.y += e * row.index.uniform[t];
    }
    sums = block_sum(sums, scratch->sums);
    const float tail = expf(row.tail_logit - largest);
    const float scale = 1.0f / (sums.x + tail);
    const float base = (tail / all + sums.y) * scale;  // what an anchor nobody names has

    float2 pulls;  // of target / r - 1, and of probs * h
    pulls.x = kDense ? relative_dense(row, rows, scale, base) : relative_sparse(row, scale, base);
    __syncthreads();
    pulls.y = kDense ? pull_dense(row, rows) : pull_sparse(row);
    pulls = block_sum(pulls, scratch->pulls);
    const float r = fmaxf(base, kSmallestRelative);
    const float errors = pulls.x + (outside > 0.0f ? (row.target_outside - outside * r) / r : 0.0f);
    const float mean = scale * pulls.y + errors * base;

    const AdamStep now = schedule.steps[step];
    for (int32_t t = thread; t < candidates; t += kSearchThreads) {
      const float pull = kDense ? row.pull[t] : row.pull[t] + row.index.uniform[t] * errors;
      const float gradient = -(row.probs[t] * scale / all) * (pull - mean);
      adam_update(gradient, now, &row.first[t], &row.second[t], &row.logits[t]);
    }
  }
}

}  // namespace deepen
