// The search over one row by one block, shared by inverse_search.cu and fuse.cu: T AdamW steps. Its
// arrays are in shared memory or in the workspace (search_layout.cuh): the same code, the same bits.
//
// One step over sparse rows (K candidates of m entries) is two gathers: r by anchor over the grouped entries,
// h by candidate over the row's own; K = 128, m = 32: 4,096 multiply-adds each, all from shared memory, and
// three barriers. Over dense rows it reads K * |A| floats twice.
#pragma once

#include <cstdint>

#include "core/cuda.h"
#include "ops/adamw.h"
#include "ops/anchor_groups.cuh"
#include "ops/relative_map.h"
#include "ops/search_layout.cuh"

namespace deepen {

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

// Keeps target / r finite where r underflows; there the true gradient is nil anyway.
constexpr float kSmallestRelative = 1e-30f;

// target / r - 1. Because a row's entries sum to 1, the 1 drops out of h_t - sum_s p_s h_s; leaving it out
// saves the digits it would cost where r is near the target.
__device__ __forceinline__ float relative_error(float target, float r) {
  r = fmaxf(r, kSmallestRelative);
  return __fdividef(target - r, r);
}

// visit(a, sum_t probs[t] * values[t, a]) for each anchor of dense rows. A candidate outside the vocabulary
// has no row.
template <class State, class Visit>
__device__ __forceinline__ void sum_by_column(const State& row, const RelativeRows& rows, Visit visit) {
#pragma unroll 1
  for (int32_t a = int32_t(threadIdx.x); a < row.index.touched; a += kSearchThreads) {
    float sum = 0.0f;
#pragma unroll 8
    for (int32_t t = 0; t < row.candidates; ++t)
      if (row.ids[t] >= 0) sum += row.probs[t] * rows.values[int64_t(row.ids[t]) * rows.entries + a];
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
    if (row.ids[t] < 0) return 0.0f;
    const float* const values = rows.values + int64_t(row.ids[t]) * rows.entries;
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
// weight decay moves it: beside that a step moves a logit by less than twice the rate
// (kMaxLearningRate of adamw.h), and what all share cancels. The mean of h needs no sum over candidates:
// sum_t p_t h_t = sum_a (target / r - 1)_a r_a.
template <bool kDense, bool kShared>
__device__ __forceinline__ void search(const SearchState<kShared>& row, const RelativeRows& rows,
                                       int64_t anchors, const SearchSchedule& schedule, float largest,
                                       SearchScratch* scratch) {
  constexpr int kLanes = kPullLanes<kDense>;
  const int32_t thread = int32_t(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int32_t candidates = row.candidates, weighing = min((candidates + 31) / 32, kSearchWarps);
  const float all = float(anchors), outside = float(anchors - row.index.touched);
  float scale = 0.0f, highest = -INFINITY;  // the largest of the candidates' logits
#pragma unroll 1
  for (int32_t step = 0;; ++step) {
    if (warp < weighing) {
      if (step > 0) largest = fmaxf(highest * schedule.steps[step - 1].keep, row.tail_logit);
      float2 sums = make_float2(0.0f, 0.0f);  // of exp(z - largest), and of that times u
      highest = -INFINITY;
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
    highest = scratch->largest[0];
#pragma unroll 4
    for (int32_t w = 1; w < weighing; ++w) {
      sums.x += scratch->sums[w].x;
      sums.y += scratch->sums[w].y;
      highest = fmaxf(highest, scratch->largest[w]);  // read here: the next step writes it anew
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
