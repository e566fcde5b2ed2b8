#include "ops/topk_softmax.h"

#include <algorithm>

#include "core/check.h"
#include "core/parallel.h"
#include "ops/topk_softmax_keys.h"

namespace deepen {

constexpr int64_t kLogitsPerThread = 1 << 17;  // some 100 microseconds

// Of all members together.
struct Sizes {
  int64_t rows = 0, logits = 0;
  int64_t most_rows = 0;  // of one member
  int64_t keys = 0;       // that a thread of the CPU twin holds
};

static Sizes add_up(const TopkSoftmaxParams* members, int64_t count) {
  Sizes sizes;
  for (const TopkSoftmaxParams* one = members; one != members + count; ++one) {
    sizes.rows += one->batch;
    sizes.logits += one->batch * one->vocab;
    sizes.most_rows = std::max(sizes.most_rows, one->batch);
    sizes.keys = std::max(sizes.keys, topk_softmax_keys(one->vocab, one->k));
  }
  return sizes;
}

// Before anything is computed from the sizes: a product of wrong ones may not fit an integer.
static void check_sizes(const TopkSoftmaxParams* members, int64_t count) {
  for (const TopkSoftmaxParams* one = members; one != members + count; ++one) {
    const int64_t batch = one->batch, vocab = one->vocab, k = one->k;
    DEEPEN_CHECK(batch >= 0, "batch is ", batch, "; it cannot be negative");
    DEEPEN_CHECK(vocab >= 1 && vocab <= INT32_MAX, "the vocabulary has ", vocab,
                 " tokens; 1 to 2^31-1 are possible");
    DEEPEN_CHECK(k >= 1 && k <= vocab, "k is ", k, "; choose 1 to the vocabulary's ", vocab);
  }
}

size_t topk_softmax_workspace(const TopkSoftmaxParams* members, int64_t count, const Backend& backend) {
  check_sizes(members, count);
  if (!on_cpu(backend)) return topk_softmax_cuda_workspace(members, count);
  const Sizes sizes = add_up(members, count);
  const int64_t threads = std::min<int64_t>(backend.threads, sizes.most_rows);
  return size_t(sizes.keys) * sizeof(uint64_t) * size_t(std::max<int64_t>(threads, 1));
}

void topk_softmax(const TopkSoftmaxParams* members, int64_t count, void* workspace, const Backend& backend) {
  check_sizes(members, count);
  const Sizes sizes = add_up(members, count);
  if (sizes.rows == 0) return;
  if (!on_cpu(backend)) return topk_softmax_cuda(members, count, workspace, backend);

  const auto row_kernel = DEEPEN_CPU(topk_softmax_row);
  auto* keys = static_cast<uint64_t*>(workspace);
  // One row of each member is not worth a second thread: one of them is most of the work.
  const int allowed = int(std::min<int64_t>(backend.threads, sizes.most_rows));
  const int threads = worthwhile_threads(allowed, sizes.logits, kLogitsPerThread);
  parallel_rows(sizes.rows, threads, [&](int thread, int64_t row) {
    const TopkSoftmaxParams* member = members;
    for (; row >= member->batch; ++member) row -= member->batch;
    row_kernel(*member, row, keys + thread * sizes.keys);
  });
}

}  // namespace deepen
