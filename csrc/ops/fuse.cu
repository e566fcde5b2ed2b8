// fuse on CUDA: see fuse.h for what it computes. The whole step of all rows in one launch.
//
// Bytes: a row reads each member's k relative rows once (k * (8 m + 4)) and writes k logits: 2 * 33 KB at k =
// 128, m = 32, two members. Operations: one look-up for each assistant's entry, then the search
// (search_row.cuh). Dense rows: (2 T + members) k |A| floats are read, by one block from L2. A row takes one
// multiprocessor a chain of dependent steps, far longer than its bytes or its arithmetic: loads are under way
// before what they wait for is needed.
//
// Assistants' entries that hit one anchor are summed as integers, so that no order matters: multiples of
// 2^-29, which cannot overflow because masses add up to 1, and apart from them what is left of each, at a
// scale that as many terms as there are tokens fit: to 2^-50 with 2,048 tokens. All other sums run in an
// order of the data's own. Launch: one block of 1,024 threads a row, shared memory as in search_row.cuh.
#include "ops/fuse.h"

#include "ops/search_row.cuh"

namespace deepen {

constexpr float kMassScale = 536870912.0f;  // 2^29
constexpr int kMassBits = 31;               // of a sum of remainders

struct FuseScratch {
  SearchScratch search;
  unsigned long long best[kMaxWarps];
  int32_t counted[kMaxMembers];
  float tails[kMaxMembers];
};
static_assert(sizeof(FuseScratch) <= kStaticSharedBytes, "the room for dynamic shared memory is wrong");

// Asks for every member's rows of the row's tokens.
__device__ __forceinline__ void prefetch_members(const FuseParams& params, int64_t b) {
  int32_t t = int32_t(threadIdx.x);
#pragma unroll 1
  for (int32_t i = 0; i < params.member_count; ++i) {
    const FuseMember& member = params.members[i];
    const int32_t k = int32_t(member.k);
#pragma unroll 1
    for (; t < k; t += kSearchThreads) prefetch_row(member.rows, member.ids[b * k + t]);
    t -= k;
  }
}

// How many of a member's tokens count, and the others' probability: a warp a member, from the last on, while
// the first ones wait for the logits.
__device__ __forceinline__ void count_tokens(const FuseParams& params, int64_t b, FuseScratch* scratch) {
  const int32_t lane = int32_t(threadIdx.x) % 32;
#pragma unroll 1
  for (int32_t i = kSearchWarps - 1 - int32_t(threadIdx.x) / 32; i < params.member_count; i += kSearchWarps) {
    const int32_t k = int32_t(params.members[i].k);
    const float* const probs = params.members[i].probs + b * k;
    const float tail = params.members[i].tail[b];
    // Sorted down: those below the bar are the last ones. The first counts in any case.
    int32_t below = 0;
    float rest = 0.0f;
#pragma unroll 4
    for (int32_t t = lane; t < k; t += 32) {
      const float prob = probs[t];
      const bool is_below = t > 0 && prob < params.min_probability;
      below += is_below;
      rest += is_below ? prob : 0.0f;
    }
    below = warp_reduce(below, Plus{});
    rest = warp_reduce(rest, Plus{});
    if (lane == 0) {
      scratch->counted[i] = k - below;
      scratch->tails[i] = tail + rest;
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
        [&](int32_t, int32_t, int32_t count, const int32_t (&columns)[4], const float (&excess)[4],
            float prob) {
#pragma unroll
          for (int q = 0; q < 4; ++q) {
            if (q >= count) break;
            const int32_t anchor = find(index, columns[q]);
            if (anchor >= 0) {
              mass.add(anchor, weight * prob * excess[q]);
            } else {
              alike.y += weight * prob * excess[q];
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
template <bool kShared>
__device__ __forceinline__ void write_back(const FuseParams& params, int64_t b,
                                           const SearchState<kShared>& row, SearchOrigin origin, float lowest,
                                           unsigned long long* scratch) {
  const FuseMember& main = params.members[0];
  const int32_t k = int32_t(main.k);
  const int64_t vocab = main.rows.vocab, start = b * vocab;
  const unsigned long long worst = choice(-INFINITY, 0);
  unsigned long long best = worst;
#pragma unroll 1
  for (int32_t t = int32_t(threadIdx.x); t < k; t += kSearchThreads) {
    const int32_t id = row.ids[t];
    if (id < 0) {
      params.fused[b * k + t] = NAN;
      continue;
    }
    const float fused = t < row.candidates ? from_search(row.logits[t], origin) : row.logits[t];
    params.fused[b * k + t] = fused;
    best = Better{}(best, choice(store_logit(params, start + id, fused), id));
  }
  best = block_reduce(best, worst, Better{}, scratch);
  // Only if every candidate fell to the others' level can one of those win.
  if (k < vocab && best >> 32 <= choice(lowest, 0) >> 32) {
#pragma unroll 1
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
  SearchState<kShared> row = search_state<kShared>(base, layout, k);
  // All that is read first is under way before anything waits for it.
  const auto token = [&](int32_t t) {
    const int32_t id = t < k ? main.ids[b * k + t] : -1;
    return id < main.rows.vocab ? id : -1;
  };
  int32_t id = token(int32_t(threadIdx.x));
  float logit = id >= 0 ? load_logit(params, start + id) : 0.0f;
  if constexpr (!kDense) {
    prefetch_members(params, b);
    clear_named(row.index);
  }
  count_tokens(params, b, scratch);
#pragma unroll 1
  for (int32_t t = int32_t(threadIdx.x); t < k; t += kSearchThreads) {
    if (t != int32_t(threadIdx.x)) {
      id = token(t);
      logit = id >= 0 ? load_logit(params, start + id) : 0.0f;
    }
    row.ids[t] = id;
    row.logits[t] = logit;
  }
  const float first_prob = main.probs[b * k];
  __syncthreads();
  // log sum exp of the whole row follows from any token's logit and probability; take the largest.
  const float highest = row.logits[0], lowest = row.logits[k - 1];
  const SearchOrigin origin =
      params.log_probs ? SearchOrigin{highest, logf(first_prob)} : SearchOrigin{0.0f, 0.0f};
  const float largest = to_search(highest, origin);
  row.candidates = row.index.candidates = scratch->counted[0];
  row.tail_logit = largest - logf(first_prob) + logf(scratch->tails[0]);
  __syncthreads();
#pragma unroll 1
  for (int32_t t = int32_t(threadIdx.x); t < k; t += kSearchThreads)
    if (t < row.candidates) row.logits[t] = to_search(row.logits[t], origin);

  if constexpr (kDense) {
    target_dense(params, b, row, scratch);
  } else {
    number_anchors(row.index, main.rows, row.ids, int32_t(params.anchors),
                   two_counts(row.index, scratch->search.counts));
    target_sparse(params, b, row, scratch);
    group_entries(row.index, two_counts(row.index, scratch->search.counts), scratch->search.entries);
    add_main_target(params, b, row);
  }
  search<kDense>(row, main.rows, params.anchors, schedule, fmaxf(largest, row.tail_logit), &scratch->search);
  write_back(params, b, row, origin, lowest, scratch->best);
}

size_t fuse_cuda_workspace(const FuseMember& main, int64_t batch, int64_t anchors) {
  return search_workspace(main.rows, batch, main.k, anchors);
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
  const auto [layout, fits] = search_place(main.rows, main.k, params.anchors, room);
  const SearchSchedule schedule = search_schedule(steps, params.steps);
  if (is_dense(main.rows)) {
    return fits ? launch<true, true>(params, layout, schedule, backend)
                : launch<true, false>(params, layout, schedule, backend);
  }
  return fits ? launch<false, true>(params, layout, schedule, backend)
              : launch<false, false>(params, layout, schedule, backend);
}

}  // namespace deepen
