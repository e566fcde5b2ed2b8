// The search over one row by one block, shared by inverse_search.cu and fuse.cu: where its arrays lie, and T
// AdamW steps over them. The arrays are in shared memory if they fit, else in the caller's workspace: the
// same code, the same bits.
//
// One step over sparse rows (K candidates of m entries) is two gathers: r by anchor over the grouped entries,
// h by candidate over the row's own; K = 128, m = 32: 4,096 multiply-adds each, all from shared memory, and
// two barriers. Over dense rows it reads K * |A| floats twice.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/check.h"
#include "core/cuda.h"
#include "ops/adamw.h"
#include "ops/anchor_index.cuh"
#include "ops/relative_map.h"

namespace deepen {

constexpr size_t kStaticSharedBytes = 2048;  // at least the kernels' own

// By value: a kernel argument.
struct SearchSchedule {
  AdamStep steps[kMaxSearchSteps];
  int32_t count;
};

static inline SearchSchedule search_schedule(const AdamStep* steps, int32_t count) {
  SearchSchedule schedule{};
#pragma unroll 1
  for (int32_t i = 0; i < count; ++i) schedule.steps[i] = steps[i];
  schedule.count = count;
  return schedule;
}

// Where a row's arrays begin, in units of 16 bytes. Those of one brace share their memory, one after the
// other.
struct SearchLayout {
  uint32_t ids, logits, probs, pull, first, second;  // [candidates]
  uint32_t lengths, uniform;                         // [candidates], sparse
  uint32_t numbers, excess;                          // [candidates * pitch], sparse
  // { columns [candidates * pitch]; mass [2 * width]; target [width] and relative or bits [width] }
  uint32_t target, relative;
  int32_t bits_room;  // uint32s from `relative` on
  // { named, several [words] and before [2 * words]; starts [candidates * pitch / 2 + 1] and the groups
  // [candidates * pitch] }
  uint32_t named, several, before;
  uint32_t starts, group_candidates, group_excess;
  uint32_t short_anchors,
      long_anchors;  // [candidates * pitch / 2], [candidates * pitch / (kShortEntries + 1)]
  size_t bytes;
  int32_t pitch, width, words;
};

// `words` * 32 candidates are grouped in one pass, or more where few anchors are named.
template <bool kShared>
static inline SearchLayout search_layout_with(const RelativeRows& rows, int64_t candidates, int64_t anchors,
                                              int64_t words) {
  using Number = SearchNumber<kShared>;
  DEEPEN_CHECK(anchors < (1 << 30), "there are ", anchors, " anchors; a CUDA search takes up to 2^30");
  SearchLayout layout{};
  size_t used = 0;
  const auto reserve = [&](int64_t count, size_t size) {
    const size_t start = used;
    used += (size_t(count) * size + 15) / 16;
    return uint32_t(start);
  };
  for (uint32_t* array : {&layout.ids, &layout.logits, &layout.probs, &layout.pull, &layout.first,
                          &layout.second, &layout.lengths, &layout.uniform}) {
    *array = reserve(candidates, 4);
  }
  if (is_dense(rows)) {
    layout.width = int32_t(anchors);
    layout.target = reserve(anchors, 4);
    layout.relative = reserve(anchors, 4);
    layout.bytes = 16 * used;
    return layout;
  }
  const int64_t pitch = (rows.entries + 3) / 4 * 4, entries = candidates * pitch;
  DEEPEN_CHECK(entries < (1 << 28), "the search has ", candidates, " candidates with ", rows.entries,
               " entries; a CUDA search takes up to 2^28 entries a row");
  layout.pitch = int32_t(pitch);
  layout.width = int32_t(entries < anchors ? entries : anchors);
  layout.words = int32_t((anchors + 63) / 64);
  layout.numbers = reserve(entries, sizeof(Number));
  layout.excess = reserve(entries, 4);
  layout.short_anchors = reserve(entries / 2, sizeof(Number));
  layout.long_anchors = reserve(entries / (kShortEntries + 1), sizeof(Number));

  const size_t early = used;
  layout.starts = reserve(entries / 2 + 1, sizeof(Number));
  layout.group_candidates = reserve(entries, sizeof(Number));
  layout.group_excess = reserve(entries, 4);
  const size_t late = used;
  used = early;
  layout.named = reserve(layout.words, 8);
  layout.several = reserve(layout.words, 8);
  layout.before = reserve(2 * layout.words, sizeof(Number));
  used = late > used ? late : used;

  layout.target = reserve(layout.width, 4);
  layout.relative = uint32_t(used);
  const int64_t staged = entries - 4 * int64_t(layout.relative - layout.target);  // columns beyond the target
  layout.bits_room = int32_t(layout.width * words);
  if (int64_t(layout.bits_room) < staged) layout.bits_room = int32_t(staged);
  reserve(layout.bits_room, 4);
  layout.bytes = 16 * used;
  return layout;
}

// The arrays in `shared_bytes` with as few passes of group_entries as fit, else in the workspace (then larger
// than that).
struct SearchPlace {
  SearchLayout layout;
  bool shared;
};
static inline SearchPlace search_place(const RelativeRows& rows, int64_t candidates, int64_t anchors,
                                       size_t shared_bytes) {
  for (int64_t words : {4, 2, 1}) {
    const SearchLayout layout = search_layout_with<true>(rows, candidates, anchors, words);
    if (layout.bytes <= shared_bytes) return {layout, true};
  }
  return {search_layout_with<false>(rows, candidates, anchors, 4), false};
}

// Rows of the workspace start at multiples of this.
static inline size_t search_row_bytes(const SearchLayout& layout) { return (layout.bytes + 127) / 128 * 128; }

// Which device it will run on, and so whether shared memory is enough, is not known here.
static inline size_t search_workspace(const RelativeRows& rows, int64_t batch, int64_t candidates,
                                      int64_t anchors) {
  return size_t(batch) * search_row_bytes(search_layout_with<false>(rows, candidates, anchors, 4));
}

template <bool kShared>
struct SearchState {
  AnchorIndex<SearchNumber<kShared>> index;  // of sparse rows
  int32_t candidates;
  int32_t* ids;  // -1 for one outside the vocabulary, as of a row whose top-k failed
  float *logits, *probs, *pull, *first, *second;
  float* target;    // [touched] or, with dense rows, [anchors]
  float* relative;  // likewise: target / r - 1
  int32_t* mass;    // [2 * touched] fuse's target as integers
  float tail_logit;
  float target_outside;  // the target's mass on anchors no candidate names
};

struct SearchScratch {
  float largest[kMaxWarps];
  float2 sums[kMaxWarps], pulls[kMaxWarps], bases[kMaxWarps];
  float errors, mean;
  int32_t entries[kMaxWarps];
  uint64_t counts[kMaxWarps];
  double inside[kMaxWarps];
};

// Scratch for counts of this index.
template <class Number>
__device__ __forceinline__ TwoCounts<Number>* two_counts(const AnchorIndex<Number>&, uint64_t* scratch) {
  return reinterpret_cast<TwoCounts<Number>*>(scratch);
}

template <bool kShared>
__device__ __forceinline__ SearchState<kShared> search_state(char* base, const SearchLayout& layout,
                                                             int32_t candidates) {
  using Number = SearchNumber<kShared>;
  SearchState<kShared> row;
  row.candidates = row.index.candidates = candidates;
  row.ids = reinterpret_cast<int32_t*>(base + size_t(16) * layout.ids);
  row.logits = reinterpret_cast<float*>(base + size_t(16) * layout.logits);
  row.probs = reinterpret_cast<float*>(base + size_t(16) * layout.probs);
  row.pull = reinterpret_cast<float*>(base + size_t(16) * layout.pull);
  row.first = reinterpret_cast<float*>(base + size_t(16) * layout.first);
  row.second = reinterpret_cast<float*>(base + size_t(16) * layout.second);
  row.target = reinterpret_cast<float*>(base + size_t(16) * layout.target);
  row.relative = reinterpret_cast<float*>(base + size_t(16) * layout.relative);
  row.mass = reinterpret_cast<int32_t*>(base + size_t(16) * layout.target);
  row.tail_logit = row.target_outside = 0.0f;
  auto& index = row.index;
  index.pitch = layout.pitch;
  index.words = layout.words;
  index.bits_room = layout.bits_room;
  index.touched = layout.width;  // of dense rows; number_anchors counts those of sparse rows
  index.short_count = index.long_count = index.single = 0;
  index.lengths = reinterpret_cast<int32_t*>(base + size_t(16) * layout.lengths);
  index.uniform = reinterpret_cast<float*>(base + size_t(16) * layout.uniform);
  index.numbers = reinterpret_cast<Number*>(base + size_t(16) * layout.numbers);
  index.excess = reinterpret_cast<float*>(base + size_t(16) * layout.excess);
  index.columns = reinterpret_cast<int32_t*>(base + size_t(16) * layout.target);
  index.named = reinterpret_cast<uint64_t*>(base + size_t(16) * layout.named);
  index.several = reinterpret_cast<uint64_t*>(base + size_t(16) * layout.several);
  index.before = reinterpret_cast<Number*>(base + size_t(16) * layout.before);
  index.starts = reinterpret_cast<Number*>(base + size_t(16) * layout.starts);
  index.group_candidates = reinterpret_cast<Number*>(base + size_t(16) * layout.group_candidates);
  index.group_excess = reinterpret_cast<float*>(base + size_t(16) * layout.group_excess);
  index.short_anchors = reinterpret_cast<Number*>(base + size_t(16) * layout.short_anchors);
  index.long_anchors = reinterpret_cast<Number*>(base + size_t(16) * layout.long_anchors);
  index.bits = reinterpret_cast<uint32_t*>(base + size_t(16) * layout.relative);
  return row;
}

// Keeps target / r finite where r underflows; there the true gradient is nil anyway.
constexpr float kSmallestRelative = 1e-30f;

// target / r - 1. Because a row's entries sum to 1, the 1 drops out of h_t - sum_s p_s h_s; leaving it out
// saves the digits it would cost where r is near the target.
__device__ __forceinline__ float relative_error(float target, float r) {
  r = fmaxf(r, kSmallestRelative);
  return __fdividef(target - r, r);
}

// visit(a, sum_t probs[t] * values[t, a]) for each anchor of dense rows.
template <class State, class Visit>
__device__ __forceinline__ void sum_by_column(const State& row, const RelativeRows& rows, Visit visit) {
#pragma unroll 1
  for (int32_t a = int32_t(threadIdx.x); a < row.index.touched; a += kSearchThreads) {
    float sum = 0.0f;
#pragma unroll 8
    for (int32_t t = 0; t < row.candidates; ++t)
      sum += row.probs[t] * rows.values[int64_t(max(row.ids[t], 0)) * rows.entries + a];
    visit(a, sum);
  }
}

// Lane `part`'s share of h_t - 1 without the uniform part, of kPullLanes lanes; of sparse rows four entries
// at a time.
template <bool kDense>
constexpr int kPullLanes = kDense ? 32 : 8;

template <bool kDense, class State>
__device__ __forceinline__ float pull_part(const State& row, const RelativeRows& rows, int32_t t,
                                           int32_t part) {
  constexpr int kLanes = kPullLanes<kDense>;
  float h = 0.0f;
  if constexpr (kDense) {
    const float* const values = rows.values + int64_t(max(row.ids[t], 0)) * rows.entries;
#pragma unroll 8
    for (int32_t a = part; a < row.index.touched; a += kLanes) h += values[a] * row.relative[a];
  } else {
    const auto& index = row.index;
    const int32_t start = t * index.pitch, length = index.lengths[t];
#pragma unroll 1
    for (int32_t j = 4 * part; j < length; j += 4 * kLanes) {
      const Four<float> excess = get_four(index.excess + start + j);
      const auto anchors = get_four(index.numbers + start + j);
#pragma unroll
      for (int q = 0; q < 4; ++q) h += excess.of[q] * row.relative[anchors.of[q]];
    }
  }
  return h;
}

// T steps on row.logits. logits, target (and, with sparse rows, the groups) were written before the last
// barrier; `largest` is the largest of logits and tail_logit. Ends in a barrier.
//
// A step has three parts, a barrier after each: candidates' weights, by as many warps as they fill; r and
// target / r - 1, by anchor; h, by candidate. exp(z - largest) takes the largest of the step before, as
// weight decay moves it: beside that a step moves a logit by a few times the learning rate at most, and what
// all share cancels. The mean of h needs no sum over candidates: sum_t p_t h_t = sum_a (target / r - 1)_a
// r_a.
template <bool kDense, bool kShared>
__device__ __forceinline__ void search(const SearchState<kShared>& row, const RelativeRows& rows,
                                       int64_t anchors, const SearchSchedule& schedule, float largest,
                                       SearchScratch* scratch) {
  constexpr int kLanes = kPullLanes<kDense>;
  const int32_t thread = int32_t(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int32_t candidates = row.candidates, weighing = min((candidates + 31) / 32, kSearchWarps);
  const float all = float(anchors), outside = float(anchors - row.index.touched);
  float scale = 0.0f;
#pragma unroll 1
  for (int32_t step = 0;; ++step) {
    if (warp < weighing) {
      if (step > 0) {
        float highest = scratch->largest[0];
#pragma unroll 4
        for (int32_t w = 1; w < weighing; ++w) highest = fmaxf(highest, scratch->largest[w]);
        largest = fmaxf(highest * schedule.steps[step - 1].keep, row.tail_logit);
        __syncwarp();  // read by all before one writes anew
      }
      float2 sums = make_float2(0.0f, 0.0f);  // of exp(z - largest), and of that times u
      float highest = -INFINITY;
#pragma unroll 1
      for (int32_t t = thread; t < candidates; t += 32 * weighing) {
        float logit = row.logits[t];
        if (step == 0) {
          row.first[t] = row.second[t] = 0.0f;
        } else {
          float pull = row.pull[t];
          if (!kDense) pull += row.index.uniform[t] * scratch->errors;
          const float gradient = -(row.probs[t] * scale / all) * (pull - scratch->mean);
          adam_update(gradient, schedule.steps[step - 1], &row.first[t], &row.second[t], &logit);
          row.logits[t] = logit;
        }
        const float e = expf(logit - largest);
        row.probs[t] = e;
        sums.x += e;
        if (!kDense) sums.y += e * row.index.uniform[t];
        highest = fmaxf(highest, logit);
      }
      if (thread == 0) {  // the tail is spread evenly
        const float tail = expf(row.tail_logit - largest);
        sums.x += tail;
        sums.y += tail / all;
      }
      sums = warp_sum(sums);
      highest = warp_reduce(highest, Larger{});
      if (lane == 0) {
        scratch->sums[warp] = sums;
        scratch->largest[warp] = highest;
      }
    }
    __syncthreads();
    if (step == schedule.count) break;

    float2 sums = scratch->sums[0];
#pragma unroll 4
    for (int32_t w = 1; w < weighing; ++w) {
      sums.x += scratch->sums[w].x;
      sums.y += scratch->sums[w].y;
    }
    scale = 1.0f / sums.x;
    const float base = sums.y * scale;       // what an anchor nobody names has
    float2 pulls = make_float2(0.0f, 0.0f);  // of target / r - 1, and of that times r without its base
    const auto compare = [&](int32_t a, float r) {
      const float error = relative_error(row.target[a], base + scale * r);
      row.relative[a] = error;
      pulls.x += error;
      pulls.y += error * r;
    };
    if constexpr (kDense) {
      sum_by_column(row, rows, compare);
    } else {
      sum_by_anchor(row.index, row.probs, compare);
    }
    pulls = warp_sum(pulls);
    if (lane == 0) scratch->pulls[warp] = pulls;
    __syncthreads();

#pragma unroll 1
    for (int32_t first = 0; first < candidates; first += kSearchThreads / kLanes) {
      const int32_t t = first + thread / kLanes;
      float pull = t < candidates ? pull_part<kDense>(row, rows, t, thread % kLanes) : 0.0f;
#pragma unroll
      for (int distance = kLanes / 2; distance > 0; distance /= 2)
        pull += __shfl_xor_sync(kWholeWarp, pull, distance);
      if (thread % kLanes == 0 && t < candidates) row.pull[t] = pull;
    }
    if (warp == kSearchWarps - 1) {  // the candidates of the last warp are the last to be there
      pulls = warp_sum(lane < kSearchWarps ? scratch->pulls[lane] : make_float2(0.0f, 0.0f));
      const float r = fmaxf(base, kSmallestRelative);
      const float errors = pulls.x + (outside > 0.0f ? (row.target_outside - outside * r) / r : 0.0f);
      if (lane == 0) {
        scratch->errors = errors;
        scratch->mean = scale * pulls.y + errors * base;
      }
    }
    __syncthreads();
  }
}

}  // namespace deepen
