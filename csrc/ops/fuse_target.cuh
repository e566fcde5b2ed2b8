// What a fusion step looks for: the members' average relative representation, at the anchors that the main
// model's candidates name.
//
// Assistants' entries that hit one anchor are summed as integers, so that no order matters. Each is split in
// two: a multiple of 2^-29, whose sum cannot overflow because masses add up to 1, and the remainder, at a
// scale that leaves room for as many terms as there are tokens (2^-50 with 1,000 tokens). All other sums run
// in an order of the data's own.
#pragma once

#include <cstdint>

#include "core/cuda.h"
#include "ops/fuse.h"
#include "ops/search_row.cuh"

namespace deepen {

constexpr float kMassScale = 536870912.0f;  // 2^29
constexpr int kMassBits = 31;               // of a sum of remainders

// A block's, in static shared memory.
struct FuseScratch {
  SearchScratch search;
  unsigned long long best[kMaxWarps];
  int32_t counted[kMaxMembers];
  float tails[kMaxMembers];
};

// An anchor's sum in two parts, which atomics of 32 bits add without looking at each other.
struct Mass {
  int32_t* whole;
  int32_t* rest;
  float rest_scale;

  __device__ __forceinline__ void add(int32_t anchor, float mass) const {
    const float scaled = mass * kMassScale;  // NaN only where a row's top-k failed
    const int32_t rounded = __float2int_rn(scaled);
    const int32_t left = __float2int_rn((scaled - float(rounded)) * rest_scale);
    if (rounded != 0) atomicAdd(&whole[anchor], rounded);
    if (left != 0) atomicAdd(&rest[anchor], left);
  }
  __device__ __forceinline__ float sum(int32_t anchor) const {
    return (float(whole[anchor]) + float(rest[anchor]) / rest_scale) * (1.0f / kMassScale);
  }
};

// The assistants' part of the average relative representation over the numbered anchors, and what all members
// give to every anchor alike; target_outside.
template <bool kShared>
__device__ __forceinline__ void target_sparse(const FuseParams& params, int64_t b, SearchState<kShared>& row,
                                              FuseScratch* scratch) {
  const auto& index = row.index;
  int64_t tokens = 1;
#pragma unroll 1
  for (int32_t i = 1; i < params.member_count; ++i) tokens += params.members[i].k;
  // A remainder is at most a half.
  const float rest_scale = ldexpf(1.0f, kMassBits - (64 - __clzll(tokens)));
  const Mass mass{row.mass, row.mass + index.touched, rest_scale};
#pragma unroll 1
  for (int32_t a = int32_t(threadIdx.x); a < 2 * index.touched; a += kSearchThreads) row.mass[a] = 0;
  __syncthreads();
  float2 alike = make_float2(0.0f, 0.0f);  // to every anchor, and to anchors without a number
#pragma unroll 1
  for (int32_t i = 0; i < params.member_count; ++i) {
    const FuseMember& member = params.members[i];
    const float weight = params.weights[b * params.member_count + i];
    const float* const probs = member.probs + b * member.k;
    if (threadIdx.x == 0) alike.x += weight * scratch->tails[i] / float(params.anchors);
    if (i == 0) {
#pragma unroll 1
      for (int32_t t = int32_t(threadIdx.x); t < row.candidates; t += kSearchThreads)
        alike.x += weight * probs[t] * index.uniform[t];
      continue;
    }
    if (weight == 0.0f) continue;
    for_each_entry(
        member.rows, member.ids + b * member.k, probs, scratch->counted[i], int32_t(params.anchors),
        [&](int32_t, int32_t part, int32_t, float uniform, float prob) {
          if (part == 0) alike.x += weight * prob * uniform;
        },
        [&](int32_t, int32_t, int32_t count, const Four<int32_t>& columns, const Four<float>& excess,
            float prob) {
#pragma unroll
          for (int q = 0; q < 4; ++q) {
            if (q >= count) break;
            const int32_t anchor = find(index, columns.of[q]);
            if (anchor >= 0) {
              mass.add(anchor, weight * prob * excess.of[q]);
            } else {
              alike.y += weight * prob * excess.of[q];
            }
          }
        });
  }
  alike = block_sum(alike, scratch->search.bases);  // its barrier ends the atomics too
#pragma unroll 1
  for (int32_t a = int32_t(threadIdx.x); a < index.touched; a += kSearchThreads)
    row.target[a] = mass.sum(a) + alike.x;
  row.target_outside = alike.y + alike.x * float(params.anchors - index.touched);
}

// The main model's part, once its entries are grouped. Begins and ends in a barrier.
template <bool kShared>
__device__ __forceinline__ void add_main_target(const FuseParams& params, int64_t b,
                                                const SearchState<kShared>& row) {
  const float weight = params.weights[b * params.member_count];
  const float* const probs = params.members[0].probs + b * params.members[0].k;
#pragma unroll 1
  for (int32_t t = int32_t(threadIdx.x); t < row.candidates; t += kSearchThreads)
    row.probs[t] = weight * probs[t];
  __syncthreads();
  sum_by_anchor(row.index, row.probs, [&](int32_t a, float sum) { row.target[a] += sum; });
  __syncthreads();
}

template <bool kShared>
__device__ __forceinline__ void target_dense(const FuseParams& params, int64_t b,
                                             const SearchState<kShared>& row, const FuseScratch* scratch) {
#pragma unroll 1
  for (int32_t a = int32_t(threadIdx.x); a < row.index.touched; a += kSearchThreads) {
    float target = 0.0f;
    for (int32_t i = 0; i < params.member_count; ++i) {
      const FuseMember& member = params.members[i];
      const float weight = params.weights[b * params.member_count + i];
      if (weight == 0.0f) continue;
      const int32_t* const ids = member.ids + b * member.k;
      const float* const probs = member.probs + b * member.k;
      float r = scratch->tails[i] / float(params.anchors);
#pragma unroll 4
      for (int32_t t = 0; t < scratch->counted[i]; ++t) {
        const int64_t token = ids[t];
        if (token < 0 || token >= member.rows.vocab) continue;
        r += probs[t] * member.rows.values[token * params.anchors + a];
      }
      target += weight * r;
    }
    row.target[a] = target;
  }
  __syncthreads();
}

}  // namespace deepen
