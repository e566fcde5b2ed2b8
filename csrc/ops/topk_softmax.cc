#include "ops/topk_softmax.h"

#include <algorithm>

#include "core/check.h"
#include "core/parallel.h"
#include "ops/topk_softmax_keys.h"

namespace deepen {

constexpr int64_t kLogitsPerThread = 1 << 17;  // some 100 microseconds

size_t topk_softmax_workspace(int64_t batch, int64_t vocab, int64_t k, const Backend& backend) {
  if (!on_cpu(backend)) return topk_softmax_cuda_workspace(batch, vocab, k);
  return size_t(topk_softmax_keys(vocab, k)) * sizeof(uint64_t) *
         size_t(std::max<int64_t>(std::min<int64_t>(backend.threads, batch), 1));
}

void topk_softmax(const TopkSoftmaxParams& params, const Backend& backend) {
  const int64_t batch = params.batch, vocab = params.vocab, k = params.k;
  DEEPEN_CHECK(batch >= 0, "batch is ", batch, "; it cannot be negative");
  DEEPEN_CHECK(vocab >= 1 && vocab <= INT32_MAX, "the vocabulary has ", vocab,
               " tokens; 1 to 2^31-1 are possible");
  DEEPEN_CHECK(k >= 1 && k <= vocab, "k is ", k, "; choose 1 to the vocabulary's ", vocab);
  if (batch == 0) return;
  if (!on_cpu(backend)) return topk_softmax_cuda(params, backend);

  const auto row_kernel = DEEPEN_CPU(topk_softmax_row);
  auto* keys = static_cast<uint64_t*>(params.workspace);
  const int64_t keys_per_thread = topk_softmax_keys(vocab, k);
  const int threads = worthwhile_threads(backend.threads, batch * vocab, kLogitsPerThread);
  parallel_rows(batch, threads,
                [&](int thread, int64_t row) { row_kernel(params, row, keys + thread * keys_per_thread); });
}

}  // namespace deepen
