// fuse on CUDA: see fuse.h for what it computes. The whole step of all rows in one launch.
//
// Bytes: a row reads each member's k relative rows once (k * (8 m + 4)) and writes k logits: 2 * 33 KB at k =
// 128, m = 32, two members. Operations: one hash look-up for each assistant's entry, then the search
// (inverse_search.cu). Dense rows: (2 T + members) k |A| floats are read, by one block from L2.
//
// Members' entries that hit one anchor are summed as 64-bit integers at scale 2^62 (masses are at most 1, so
// the sum is exact to 2^-62 and no order matters), by two 32-bit atomics with the carry between them: shared
// memory has no 64-bit integer add. All other sums run in an order of the data's own.
// Launch: one block of 512 threads a row, shared memory as in inverse_search.cu.
#include "ops/fuse.h"

#include "ops/search_row.cuh"

namespace deepen {

constexpr float kMassScale = 4611686018427387904.0f;  // 2^62

struct FuseScratch {
  SearchScratch search;
  unsigned long long best[kMaxWarps];
  int32_t counted[kMaxMembers];
  float tails[kMaxMembers];
};

// How many of a member's tokens count, and the others' probability: a warp a member.
__device__ __forceinline__ void count_tokens(const FuseParams& params, int64_t b, FuseScratch* scratch) {
  const int lane = int(threadIdx.x) % 32;
  for (int32_t i = int32_t(threadIdx.x) / 32; i < params.member_count; i += kSearchWarps) {
    const int32_t k = int32_t(params.members[i].k);
    const float* const probs = params.members[i].probs + b * k;
    int32_t counted = k;
    float rest = 0.0f;
    if (params.min_probability > 0.0f) {
      // Sorted down: those below the bar are the last ones. The first counts in any case.
      int32_t below = 0;
      for (int32_t t = lane; t < k; t += 32) {
        if (t == 0 || !(probs[t] < params.min_probability)) continue;
        rest += probs[t];
        ++below;
      }
      counted = k - warp_reduce(below, Plus{});
      rest = warp_reduce(rest, Plus{});
    }
    if (lane == 0) {
      scratch->counted[i] = counted;
      scratch->tails[i] = params.members[i].tail[b] + rest;
    }
  }
}

__device__ __forceinline__ float load_logit(const FuseParams& params, int64_t index) {
  switch (params.dtype) {
    case Dtype::f16: return to_float(static_cast<const Half*>(params.logits)[index]);
    case Dtype::bf16: return to_float(static_cast<const BFloat16*>(params.logits)[index]);
    default: return static_cast<const float*>(params.logits)[index];
  }
}

// Returns the value as it was rounded.
__device__ __forceinline__ float store_logit(const FuseParams& params, int64_t index, float value) {
  switch (params.dtype) {
    case Dtype::f16: from_float(value, &static_cast<Half*>(params.logits)[index]); break;
    case Dtype::bf16: from_float(value, &static_cast<BFloat16*>(params.logits)[index]); break;
    default: static_cast<float*>(params.logits)[index] = value;
  }
  return load_logit(params, index);
}

// Integer sums do not depend on the order of their terms.
__device__ __forceinline__ void add_mass(const SearchState& row, int32_t width, int32_t anchor, float mass) {
  const float within = fminf(fmaxf(mass, -1.0f), 1.0f);  // NaN only where a row's top-k failed
  const uint64_t fixed = uint64_t(int64_t(within * kMassScale));
  const uint32_t low = uint32_t(fixed), high = uint32_t(fixed >> 32);
  const uint32_t before = atomicAdd(&row.mass[anchor], low);
  const uint32_t carried = high + uint32_t(before + low < before);
  if (carried != 0) atomicAdd(&row.mass[width + anchor], carried);
}

// The average relative representation over the numbered anchors, and target_outside.
__device__ __forceinline__ void target_sparse(const FuseParams& params, int64_t b, int32_t width,
                                              SearchState& row, FuseScratch* scratch) {
  const AnchorIndex& index = row.index;
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  for (int32_t a = int32_t(threadIdx.x); a < index.touched; a += kSearchThreads)
    row.mass[a] = row.mass[width + a] = 0;
  __syncthreads();
  float2 alike =
      make_float2(0.0f, 0.0f);  // what every anchor gets, and what goes to anchors without a number
  for (int32_t i = 0; i < params.member_count; ++i) {
    const FuseMember& member = params.members[i];
    const float weight = params.weights[b * params.member_count + i];
    if (weight == 0.0f) continue;
    const float* const probs = member.probs + b * member.k;
    if (threadIdx.x == 0) alike.x += weight * scratch->tails[i] / float(params.anchors);
    if (i == 0) {
      for (int32_t t = warp; t < row.candidates; t += kSearchWarps) {
        const float share = weight * probs[t];
        if (lane == 0) alike.x += share * index.uniform[t];
        for (int32_t j = lane; j < index.lengths[t]; j += 32) {
          const int32_t e = t * index.pitch + j;
          add_mass(row, width, index.numbers[e], share * index.excess[e]);
        }
      }
      continue;
    }
    for_each_entry(
        member.rows, member.ids + b * member.k, scratch->counted[i], params.anchors,
        [&](int32_t t, int32_t, float uniform) {
          if (lane == 0) alike.x += weight * probs[t] * uniform;
        },
        [&](int32_t t, int32_t, int32_t column, float excess) {
          const float mass = weight * probs[t] * excess;
          const int32_t anchor = find(index, column);
          if (anchor >= 0) {
            add_mass(row, width, anchor, mass);
          } else {
            alike.y += mass;
          }
        });
  }
  alike = block_sum(alike, scratch->search.bases);  // its barrier ends the atomics too
  for (int32_t a = int32_t(threadIdx.x); a < index.touched; a += kSearchThreads) {
    const uint64_t fixed = uint64_t(row.mass[width + a]) << 32 | row.mass[a];
    row.target[a] = float(int64_t(fixed)) * (1.0f / kMassScale) + alike.x;
  }
  row.target_outside = alike.y + alike.x * float(params.anchors - index.touched);
  __syncthreads();
}

__device__ __forceinline__ void target_dense(const FuseParams& params, int64_t b, const SearchState& row,
                                             const FuseScratch* scratch) {
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
        const int64_t token = ids[t] >= 0 && ids[t] < member.rows.vocab ? ids[t] : 0;
        r += probs[t] * member.rows.values[token * params.anchors + a];
      }
      target += weight * r;
    }
    row.target[a] = target;
  }
  __syncthreads();
}

// Larger for the larger logit, then for the lower id.
__device__ __forceinline__ unsigned long long choice(float logit, int32_t id) {
  const uint32_t bits = float_to_bits(logit + 0.0f);  // -0 becomes +0
  const uint32_t rank = bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
  return (unsigned long long)(rank) << 32 | uint32_t(INT32_MAX - id);
}
__device__ __forceinline__ int32_t chosen_id(unsigned long long choice) {
  return INT32_MAX - int32_t(uint32_t(choice));
}

struct Better {
  __device__ __forceinline__ unsigned long long operator()(unsigned long long a, unsigned long long b) const {
    return a > b ? a : b;
  }
};

// `lowest` is the logit of the last of the top k before fusion: no token outside the top k is above it.
__device__ __forceinline__ void write_back(const FuseParams& params, int64_t b, const SearchState& row,
                                           SearchOrigin origin, float lowest, unsigned long long* scratch) {
  const FuseMember& main = params.members[0];
  const int32_t k = int32_t(main.k);
  const int64_t vocab = main.rows.vocab, start = b * vocab;
  const unsigned long long worst = choice(-INFINITY, 0);
  unsigned long long best = worst;
  for (int32_t t = int32_t(threadIdx.x); t < k; t += kSearchThreads) {
    const int32_t id = row.ids[t];
    if (id < 0) {
      params.fused[b * k + t] = NAN;
      continue;
    }
    const float fused =
        t < row.candidates ? from_search(row.logits[t], origin) : load_logit(params, start + id);
    params.fused[b * k + t] = fused;
    best = Better{}(best, choice(store_logit(params, start + id, fused), id));
  }
  best = block_reduce(best, worst, Better{}, scratch);
  // Only if every candidate fell to the others' level can one of those win.
  if (k < vocab && best >> 32 <= choice(lowest, 0) >> 32) {
    for (int32_t id = int32_t(threadIdx.x); id < vocab; id += kSearchThreads)
      best = Better{}(best, choice(load_logit(params, start + id), id));
    best = block_reduce(best, worst, Better{}, scratch);
  }
  if (threadIdx.x == 0) params.chosen[b] = chosen_id(best);
}

template <bool kDense, bool kShared>
__global__ void __launch_bounds__(kSearchThreads, 1)
    fuse_kernel(const FuseParams params, const SearchLayout layout, const SearchSchedule schedule,
                const size_t row_bytes) {
  DEEPEN_SHARED(char, shared);
  DEEPEN_STATIC_SHARED(FuseScratch, scratch, 1);
  const FuseMember& main = params.members[0];
  const int64_t b = blockIdx.x, start = b * main.rows.vocab;
  const int32_t k = int32_t(main.k);
  char* const base = kShared ? shared : static_cast<char*>(params.workspace) + b * row_bytes;
  SearchState row = search_state(base, layout, k);
  count_tokens(params, b, scratch);
  const auto logit_of = [&](int32_t t) {
    const int32_t id = main.ids[b * k + t];
    return id >= 0 && id < main.rows.vocab ? load_logit(params, start + id) : 0.0f;
  };
  const SearchOrigin origin =
      params.log_probs ? SearchOrigin{logit_of(0), logf(main.probs[b * k])} : SearchOrigin{0.0f, 0.0f};
  for (int32_t t = int32_t(threadIdx.x); t < k; t += kSearchThreads) {
    const int32_t id = main.ids[b * k + t];
    const bool known = id >= 0 && id < main.rows.vocab;
    row.ids[t] = known ? id : -1;
    row.logits[t] = to_search(logit_of(t), origin);
  }
  __syncthreads();
  row.candidates = row.index.candidates = scratch->counted[0];
  // log sum exp of the whole row follows from any token's logit and probability; take the largest.
  row.tail_logit = row.logits[0] - logf(main.probs[b * k]) + logf(scratch->tails[0]);
  const float lowest = logit_of(k - 1);

  if (kDense) {
    target_dense(params, b, row, scratch);
  } else {
    number_anchors(row.index, main.rows, row.ids, params.anchors, scratch->search.firsts);
    target_sparse(params, b, layout.width, row, scratch);
    group_entries(row.index, scratch->search.groups);
  }
  search<kDense>(row, main.rows, params.anchors, schedule, &scratch->search);
  write_back(params, b, row, origin, lowest, scratch->best);
}

size_t fuse_cuda_workspace(const FuseMember& main, int64_t batch, int64_t anchors) {
  // Which device it will run on, and so whether shared memory is enough, is not known here.
  return size_t(batch) * search_row_bytes(search_layout(main.rows, main.k, anchors, 0));
}

template <bool kDense, bool kShared>
static void launch(const FuseParams& params, const SearchLayout& layout, const SearchSchedule& schedule,
                   const Backend& backend) {
  DEEPEN_LAUNCH((fuse_kernel<kDense, kShared>), unsigned(params.batch), kSearchThreads,
                kShared ? layout.bytes : 0, backend.stream, params, layout, schedule,
                search_row_bytes(layout));
}

void fuse_cuda(const FuseParams& params, const AdamStep* steps, const Backend& backend) {
  const DeviceGuard guard(backend.device);
  const FuseMember& main = params.members[0];
  DEEPEN_CHECK(params.batch <= INT32_MAX, "batch is ", params.batch, "; a CUDA grid takes up to 2^31 - 1");
  const size_t room = size_t(max_shared_bytes(backend.device)) - kStaticSharedBytes;
  const SearchLayout layout = search_layout(main.rows, main.k, params.anchors, room);
  const SearchSchedule schedule = search_schedule(steps, params.steps);
  const bool fits = layout.bytes <= room;
  if (is_dense(main.rows)) {
    return fits ? launch<true, true>(params, layout, schedule, backend)
                : launch<true, false>(params, layout, schedule, backend);
  }
  return fits ? launch<false, true>(params, layout, schedule, backend)
              : launch<false, false>(params, layout, schedule, backend);
}

}  // namespace deepen
