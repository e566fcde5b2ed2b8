#include "ops/inverse_search.h"

#include <algorithm>

#include "core/check.h"
#include "core/parallel.h"
#include "ops/search_row.h"

namespace deepen {

size_t inverse_search_workspace(const RelativeRows& rows, int64_t candidates, int64_t anchors, int threads) {
  Arena arena{nullptr};
  take_search_row(arena, rows, candidates, anchors);
  return arena.used * size_t(std::max(threads, 1));
}

void inverse_search_cpu(const InverseSearchParams& params, int threads) {
  DEEPEN_CHECK(params.batch >= 0, "batch is ", params.batch, "; it cannot be negative");
  DEEPEN_CHECK(params.candidates >= 1 && params.candidates <= params.rows.vocab, "candidates is ",
               params.candidates, "; choose 1 to the vocabulary's ", params.rows.vocab);
  DEEPEN_CHECK(params.anchors >= 1, "there are no anchors");
  DEEPEN_CHECK(params.rows.entries >= 1 && params.rows.entries <= params.anchors, "rows have ",
               params.rows.entries, " entries; choose 1 to the number of anchors, ", params.anchors);
  DEEPEN_CHECK(params.steps >= 0 && params.steps <= kMaxSearchSteps, "steps is ", params.steps,
               "; choose 0 to ", kMaxSearchSteps);
  DEEPEN_CHECK(params.learning_rate > 0 && std::isfinite(params.learning_rate), "learning_rate is ",
               params.learning_rate, "; it must be positive");
  DEEPEN_CHECK(threads >= 1, "threads is ", threads, "; at least one is needed");
  if (params.batch == 0) return;

  AdamStep schedule[kMaxSearchSteps];
  for (int step = 0; step < params.steps; ++step) schedule[step] = adam_step(params.learning_rate, step);
  const auto row_kernel = DEEPEN_CPU(inverse_search_row);
  const size_t per_thread = inverse_search_workspace(params.rows, params.candidates, params.anchors, 1);
  parallel_for(params.batch, threads, [&](int thread, int64_t begin, int64_t end) {
    char* workspace = static_cast<char*>(params.workspace) + size_t(thread) * per_thread;
    for (int64_t row = begin; row < end; ++row) row_kernel(params, schedule, row, workspace);
  });
}

}  // namespace deepen
