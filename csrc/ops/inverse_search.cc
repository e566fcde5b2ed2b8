#include "ops/inverse_search.h"

#include <algorithm>

#include "core/check.h"
#include "core/parallel.h"
#include "ops/check_tokens.h"
#include "ops/search_row.h"

namespace deepen {

// Before anything is computed from the sizes: a product of wrong ones may not fit an integer.
static void check_sizes(const RelativeRows& rows, int64_t batch, int64_t candidates, int64_t anchors) {
  DEEPEN_CHECK(batch >= 0, "batch is ", batch, "; it cannot be negative");
  DEEPEN_CHECK(candidates >= 1 && candidates <= rows.vocab, "candidates is ", candidates,
               "; choose 1 to the vocabulary's ", rows.vocab);
  DEEPEN_CHECK(anchors >= 1, "there are no anchors");
  DEEPEN_CHECK(rows.entries >= 1 && rows.entries <= anchors, "rows have ", rows.entries,
               " entries; choose 1 to the number of anchors, ", anchors);
}

static size_t cpu_workspace(const RelativeRows& rows, int64_t candidates, int64_t anchors) {
  check_search_size(rows, candidates, anchors);
  Arena arena{nullptr};
  take_search_row(arena, rows, candidates, anchors);
  return arena.used;
}

size_t inverse_search_workspace(const RelativeRows& rows, int64_t batch, int64_t candidates, int64_t anchors,
                                const Backend& backend) {
  check_sizes(rows, batch, candidates, anchors);
  if (!on_cpu(backend)) return inverse_search_cuda_workspace(rows, batch, candidates, anchors);
  return cpu_workspace(rows, candidates, anchors) *
         size_t(std::max<int64_t>(std::min<int64_t>(backend.threads, batch), 1));
}

void inverse_search(const InverseSearchParams& params, const Backend& backend) {
  check_sizes(params.rows, params.batch, params.candidates, params.anchors);
  DEEPEN_CHECK(params.steps >= 0 && params.steps <= kMaxSearchSteps, "steps is ", params.steps,
               "; choose 0 to ", kMaxSearchSteps);
  DEEPEN_CHECK(params.learning_rate > 0 && params.learning_rate <= kMaxLearningRate, "learning_rate is ",
               params.learning_rate, "; choose above 0 to ", kMaxLearningRate);
  if (params.batch == 0) return;

  AdamStep schedule[kMaxSearchSteps];
  for (int step = 0; step < params.steps; ++step) schedule[step] = adam_step(params.learning_rate, step);
  if (!on_cpu(backend)) return inverse_search_cuda(params, schedule, backend);
  check_token_ids(params.ids, params.batch * params.candidates, params.rows.vocab, 0);
  check_columns(params.rows, params.ids, params.batch * params.candidates, params.anchors, 0);
  const auto row_kernel = DEEPEN_CPU(inverse_search_row);
  const size_t per_thread = cpu_workspace(params.rows, params.candidates, params.anchors);
  const int threads = worthwhile_threads(backend.threads, params.batch, kSearchRowsPerThread);
  parallel_rows(params.batch, threads, [&](int thread, int64_t row) {
    row_kernel(params, schedule, row, static_cast<char*>(params.workspace) + size_t(thread) * per_thread);
  });
}

}  // namespace deepen
