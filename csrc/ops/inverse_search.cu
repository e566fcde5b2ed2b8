// inverse_search on CUDA: see inverse_search.h for what it computes.
//
// Bytes: a row reads its candidates' relative rows once (K * (8 m + 4)), its target at the anchors they name,
// and writes K logits: 40 KB at K = 128, m = 32. Operations: T * 4 K m multiply-adds and K T exponentials.
// Both are far below what one multiprocessor does in a microsecond; what counts is the chain of dependent
// steps, so all T of them run in one launch from shared memory.
// Dense rows: 2 T K |A| floats are read, by one block from L2.
// Launch: one block of 1,024 threads a row; arrays in shared memory (144 KiB at K = 128, m = 32 and 100,000
// anchors; 96 KiB where there is no more) or, where they do not fit, in the workspace.
#include "ops/inverse_search.h"

#include "ops/search_row.cuh"

namespace deepen {

template <bool kDense, bool kShared>
__global__ void __launch_bounds__(kSearchThreads, 1)
    inverse_search_kernel(const InverseSearchParams params, const SearchLayout layout,
                          const SearchSchedule schedule, const size_t row_bytes) {
  DEEPEN_SHARED(char, shared);
  DEEPEN_STATIC_SHARED(SearchScratch, scratch, 1);
  const int64_t b = blockIdx.x;
  const int32_t thread = int32_t(threadIdx.x), candidates = int32_t(params.candidates);
  char* const base = kShared ? shared : static_cast<char*>(params.workspace) + b * row_bytes;
  SearchState<kShared> row = search_state<kShared>(base, layout, candidates);
  if constexpr (!kDense) clear_named(row.index);
  float largest = params.tail_logit[b];
  for (int32_t t = thread; t < candidates; t += kSearchThreads) {
    const int32_t id = params.ids[b * candidates + t];
    row.ids[t] = id >= 0 && id < params.rows.vocab ? id : -1;
    row.logits[t] = params.logits[b * candidates + t];
    largest = fmaxf(largest, row.logits[t]);
  }
  row.tail_logit = params.tail_logit[b];
  largest = block_reduce(largest, -INFINITY, Larger{}, scratch->largest);

  const float* const target = params.target + b * params.anchors;
  if (kDense) {
    for (int32_t a = thread; a < layout.width; a += kSearchThreads) row.target[a] = target[a];
  } else {
    number_anchors(row.index, params.rows, row.ids, int32_t(params.anchors),
                   two_counts(row.index, scratch->counts));
    gather_named(row.index, target, row.target);
    __syncthreads();
    double inside = 0.0;
    for (int32_t a = thread; a < row.index.touched; a += kSearchThreads) inside += double(row.target[a]);
    inside = block_reduce(inside, 0.0, Plus{}, scratch->inside);
    row.target_outside = inside < 1.0 ? float(1.0 - inside) : 0.0f;
    group_entries(row.index, two_counts(row.index, scratch->counts), scratch->entries);
  }

  search<kDense>(row, params.rows, params.anchors, schedule, largest, scratch);
  for (int32_t t = thread; t < candidates; t += kSearchThreads)
    params.found[b * candidates + t] = row.ids[t] < 0 ? NAN : row.logits[t];
}

size_t inverse_search_cuda_workspace(const RelativeRows& rows, int64_t batch, int64_t candidates,
                                     int64_t anchors) {
  return search_workspace(rows, batch, candidates, anchors);
}

template <bool kDense, bool kShared>
static void launch(const InverseSearchParams& params, const SearchLayout& layout,
                   const SearchSchedule& schedule, const Backend& backend) {
  DEEPEN_LAUNCH((inverse_search_kernel<kDense, kShared>), unsigned(params.batch), kSearchThreads,
                kShared ? layout.bytes : 0, backend.stream, params, layout, schedule,
                search_row_bytes(layout));
}

void inverse_search_cuda(const InverseSearchParams& params, const AdamStep* steps, const Backend& backend) {
  const DeviceGuard guard(backend.device);
  DEEPEN_CHECK(params.batch <= INT32_MAX, "batch is ", params.batch, "; a CUDA grid takes up to 2^31 - 1");
  const size_t room = size_t(max_shared_bytes(backend.device)) - kStaticSharedBytes;
  const auto [layout, fits] = search_place(params.rows, params.candidates, params.anchors, room);
  const SearchSchedule schedule = search_schedule(steps, params.steps);
  if (is_dense(params.rows)) {
    return fits ? launch<true, true>(params, layout, schedule, backend)
                : launch<true, false>(params, layout, schedule, backend);
  }
  return fits ? launch<false, true>(params, layout, schedule, backend)
              : launch<false, false>(params, layout, schedule, backend);
}

}  // namespace deepen
