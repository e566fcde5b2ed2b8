#include "ops/fuse.h"

#include <algorithm>
#include <cmath>

#include "core/check.h"
#include "core/parallel.h"
#include "ops/check_tokens.h"
#include "ops/search_row.h"

namespace deepen {

// Before anything is computed from the sizes: a product of wrong ones may not fit an integer.
static void check_sizes(const FuseMember& member, int32_t i, int64_t anchors) {
  DEEPEN_CHECK(anchors >= 1, "there are no anchors");
  DEEPEN_CHECK(member.k >= 1 && member.k <= member.rows.vocab, "member ", i, " gives ", member.k,
               " tokens; choose 1 to its vocabulary's ", member.rows.vocab);
  DEEPEN_CHECK(member.rows.entries >= 1 && member.rows.entries <= anchors, "rows of member ", i, " have ",
               member.rows.entries, " entries; choose 1 to the number of anchors, ", anchors);
}

static size_t cpu_workspace(const FuseMember& main, int64_t anchors) {
  check_search_size(main.rows, main.k, anchors);
  Arena arena{nullptr};
  take_search_row(arena, main.rows, main.k, anchors);
  return arena.used;
}

size_t fuse_workspace(const FuseMember& main, int64_t batch, int64_t anchors, const Backend& backend) {
  check_sizes(main, 0, anchors);
  if (!on_cpu(backend)) return fuse_cuda_workspace(main, batch, anchors);
  return cpu_workspace(main, anchors) *
         size_t(std::max<int64_t>(std::min<int64_t>(backend.threads, batch), 1));
}

// The logits are written while everything else is read.
static void check_apart(const FuseParams& params) {
  const auto* logits = static_cast<const char*>(params.logits);
  const int64_t size = params.batch * params.members[0].rows.vocab * (params.dtype == Dtype::f32 ? 4 : 2);
  const auto check = [&](const void* other, int64_t count, const char* name) {
    const auto* begin = static_cast<const char*>(other);
    DEEPEN_CHECK(begin == nullptr || begin >= logits + size || begin + 4 * count <= logits,
                 "logits share memory with ", name, "; pass logits.clone()");
  };
  check(params.weights, params.batch * params.member_count, "the weights");
  for (int32_t i = 0; i < params.member_count; ++i) {
    const FuseMember& member = params.members[i];
    check(member.ids, params.batch * member.k, "a member's ids");
    check(member.probs, params.batch * member.k, "a member's probs");
    check(member.tail, params.batch, "a member's tail");
    check(member.rows.columns, member.rows.vocab * member.rows.entries, "a member's columns");
    check(member.rows.values, member.rows.vocab * member.rows.entries, "a member's row values");
    check(member.rows.rest, member.rows.vocab, "a member's rest");
  }
}

// What fuse_row reads: all ids of the main model; of an assistant and of either's rows what counts.
static void check_tokens(const FuseParams& params) {
  for (int64_t b = 0; b < params.batch; ++b) {
    for (int32_t i = 0; i < params.member_count; ++i) {
      const FuseMember& member = params.members[i];
      if (i > 0 && params.weights[b * params.member_count + i] == 0.0f) continue;
      const int32_t* ids = member.ids + b * member.k;
      const float* probs = member.probs + b * member.k;
      int64_t counted = member.k;
      while (counted > 1 && probs[counted - 1] < params.min_probability) --counted;
      check_token_ids(ids, i == 0 ? member.k : counted, member.rows.vocab, i);
      check_columns(member.rows, ids, counted, params.anchors, i);
    }
  }
}

// As deepen_ext/fusers/weights.py has it. A row that sums to something else has no relative vector.
static void check_weights(const FuseParams& params) {
  for (int64_t b = 0; b < params.batch; ++b) {
    double sum = 0;
    for (int32_t i = 0; i < params.member_count; ++i) {
      const float weight = params.weights[b * params.member_count + i];
      DEEPEN_CHECK(weight >= 0 && std::isfinite(weight), "the weight of member ", i, " in row ", b, " is ",
                   weight, "; none may be negative, infinite or NaN");
      sum += double(weight);
    }
    DEEPEN_CHECK(std::fabs(sum - 1) <= 1e-3, "the weights of row ", b, " sum to ", sum,
                 "; they must sum to 1");
  }
}

void check_search_settings(double learning_rate, int32_t steps, float min_probability) {
  DEEPEN_CHECK(steps >= 0 && steps <= kMaxSearchSteps, "steps is ", steps, "; choose 0 to ", kMaxSearchSteps);
  DEEPEN_CHECK(learning_rate > 0 && learning_rate <= kMaxLearningRate, "learning_rate is ", learning_rate,
               "; choose above 0 to ", kMaxLearningRate);
  DEEPEN_CHECK(min_probability >= 0 && min_probability < 1, "min_probability is ", min_probability,
               "; choose 0 to below 1");
}

void fuse(const FuseParams& params, const Backend& backend) {
  DEEPEN_CHECK(params.batch >= 0, "batch is ", params.batch, "; it cannot be negative");
  DEEPEN_CHECK(params.member_count >= 1 && params.member_count <= kMaxMembers, "there are ",
               params.member_count, " members; 1 to ", kMaxMembers, " are possible");
  for (int32_t i = 0; i < params.member_count; ++i) {
    const FuseMember& member = params.members[i];
    check_sizes(member, i, params.anchors);
    DEEPEN_CHECK(is_dense(member.rows) == is_dense(params.members[0].rows),
                 "members mix dense and sparse relative rows; make all of one kind");
  }
  check_search_settings(params.learning_rate, params.steps, params.min_probability);
  check_apart(params);
  if (params.batch == 0) return;

  AdamStep schedule[kMaxSearchSteps];
  for (int step = 0; step < params.steps; ++step) schedule[step] = adam_step(params.learning_rate, step);
  if (!on_cpu(backend)) return fuse_cuda(params, schedule, backend);
  check_weights(params);
  check_tokens(params);
  const auto row_kernel = DEEPEN_CPU(fuse_row);
  const size_t per_thread = cpu_workspace(params.members[0], params.anchors);
  const int threads = worthwhile_threads(backend.threads, params.batch, kSearchRowsPerThread);
  parallel_rows(params.batch, threads, [&](int thread, int64_t row) {
    row_kernel(params, schedule, row, static_cast<char*>(params.workspace) + size_t(thread) * per_thread);
  });
}

}  // namespace deepen
