// fuse on CUDA: see fuse.h for what it computes. The whole step of all rows in one launch.
//
// Bytes: a row reads each member's k relative rows once (k * (8 m + 4)) and writes k logits: 2 * 33 KB at k =
// 128, m = 32, two members. Operations: one look-up for each assistant's entry, then the search
// (search_row.cuh). Dense rows: (2 T + members) k |A| floats are read, by one block from L2. One
// multiprocessor runs a row; its time is the instructions that are issued and the steps that wait for each
// other, not bytes. So what is read first is under way early, and no warp repeats another's work.
// Launch: one block of 1,024 threads a row, shared memory as in search_layout.cuh.
#include "ops/fuse.h"

#include "ops/fuse_target.cuh"
#include "ops/search_row.cuh"

namespace deepen {

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
  constexpr int kAtOnce = 8;  // loads under way
  if (k < vocab && best >> 32 <= choice(lowest, 0) >> 32) {
#pragma unroll 1
    for (int64_t first = int64_t(threadIdx.x); first < vocab; first += kAtOnce * kSearchThreads) {
      float logits[kAtOnce];
#pragma unroll
      for (int q = 0; q < kAtOnce; ++q) {
        const int64_t id = first + q * kSearchThreads;
        logits[q] = id < vocab ? load_logit(params, start + id) : -INFINITY;
      }
#pragma unroll
      for (int q = 0; q < kAtOnce; ++q) {
        const int64_t id = first + q * kSearchThreads;
        if (id < vocab) best = Better{}(best, choice(logits[q], int32_t(id)));
      }
    }
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
