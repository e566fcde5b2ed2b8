#include "ops/relative_rows.h"

#include <algorithm>
#include <cmath>

#include "core/arena.h"
#include "core/check.h"
#include "core/parallel.h"
#include "ops/topk_softmax.h"
#include "ops/topk_softmax_keys.h"

namespace deepen {

static RelativeRowsBlock take_block(Arena& arena, int64_t dim, int64_t anchors, int64_t entries,
                                    int64_t count, int threads) {
  RelativeRowsBlock block{};
  const int64_t tokens = std::min(count, kTokenBlock);
  block.queries = take<float>(arena, tokens * dim);
  block.offsets = take<float>(arena, tokens);
  block.scores = take<float>(arena, tokens * anchors);
  block.keys = take<uint64_t>(arena, threads * topk_softmax_keys(anchors, entries));
  return block;
}

// Before anything is computed from the sizes: a product of wrong ones may not fit an integer.
static void check_sizes(int64_t dim, int64_t anchors, int64_t entries, int64_t count) {
  DEEPEN_CHECK(count >= 0, "count is ", count, "; it cannot be negative");
  DEEPEN_CHECK(anchors >= 1 && anchors <= INT32_MAX, "there are ", anchors,
               " anchors; 1 to 2^31-1 are possible");
  DEEPEN_CHECK(dim >= 1 && dim <= INT32_MAX, "the embedding has ", dim, " columns; 1 to 2^31-1 are possible");
  DEEPEN_CHECK(entries >= 1 && entries <= anchors, "entries is ", entries,
               "; choose 1 to the number of anchors, ", anchors);
}

size_t relative_rows_workspace(int64_t dim, int64_t anchors, int64_t entries, int64_t count,
                               const Backend& backend) {
  check_sizes(dim, anchors, entries, count);
  if (!on_cpu(backend)) return relative_rows_cuda_workspace(dim, anchors, entries, count, backend);
  Arena arena{nullptr};
  take_block(arena, dim, anchors, entries, count, std::max(backend.threads, 1));
  return arena.used;
}

void relative_rows(const RelativeRowsParams& params, const Backend& backend) {
  check_sizes(params.dim, params.anchors, params.entries, params.count);
  DEEPEN_CHECK(params.temperature > 0 && std::isfinite(params.temperature), "temperature is ",
               params.temperature, "; it must be positive");
  if (params.count == 0) return;
  if (!on_cpu(backend)) return relative_rows_cuda(params, backend);

  const int threads = backend.threads;
  for (int64_t n = 0; n < params.count; ++n) {
    DEEPEN_CHECK(params.tokens[n] >= 0 && params.tokens[n] < params.vocab, "token ", params.tokens[n],
                 " is outside the embedding's ", params.vocab, " rows");
  }
  for (int64_t a = 0; a < params.anchors; ++a) {
    DEEPEN_CHECK(params.anchor_ids[a] >= 0 && params.anchor_ids[a] < params.vocab, "anchor token ",
                 params.anchor_ids[a], " is outside the embedding's ", params.vocab, " rows");
  }

  Arena arena{static_cast<char*>(params.workspace)};
  RelativeRowsBlock block =
      take_block(arena, params.dim, params.anchors, params.entries, params.count, threads);
  const int64_t keys_per_thread = topk_softmax_keys(params.anchors, params.entries);
  const auto prepare = DEEPEN_CPU(prepare_queries);
  const auto score = DEEPEN_CPU(score_anchors);
  const auto finish = DEEPEN_CPU(finish_row);
  for (block.first = 0; block.first < params.count; block.first += kTokenBlock) {
    block.count = std::min(kTokenBlock, params.count - block.first);
    prepare(params, block);
    parallel_for(params.anchors, threads,
                 [&](int, int64_t begin, int64_t end) { score(params, block, begin, end); });
    parallel_for(block.count, threads, [&](int thread, int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) finish(params, block, n, block.keys + thread * keys_per_thread);
    });
  }
}

}  // namespace deepen
