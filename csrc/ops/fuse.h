// fuse: one whole DeePEn step for each row, from the members' top-k tokens to the main model's new logits.
//
//   r_i  = sum_t p_i[t] R_i[t, :] + tail_i / |A|        every member's relative representation
//   target = sum_i weights[b, i] r_i                    the average, in relative space
//   z    = inverse_search(main model's candidates, target)
//   logits[b, ids_0] = z; chosen[b] = argmax(logits[b, :]), ties to the lower id
//
// With `log_probs` the search starts from the candidates' log-probabilities, z - log sum exp of the whole
// row, and that sum is added again before the result is written. AdamW's weight decay pulls what it moves to
// 0, and leaves the tokens that are no candidates: on logits the result depends on where their 0 is.
//
// Candidates are the main model's tokens. A token whose probability is below `min_probability` counts as part
// of its member's tail (and is no candidate): the choice depends on the probability alone, never on what is
// cached.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/backend.h"
#include "core/dtype.h"
#include "core/host_device.h"
#include "core/isa.h"
#include "ops/adamw.h"
#include "ops/relative_map.h"

namespace deepen {

constexpr int kMaxMembers = 16;

struct FuseMember {
  const int32_t* ids;  // [batch, k] from topk_softmax
  const float* probs;  // [batch, k]
  const float* tail;   // [batch]
  RelativeRows rows;
  int64_t k;
};

struct FuseParams {
  FuseMember members[kMaxMembers];  // the main model first
  const float* weights;             // [batch, member_count], each row sums to 1
  void* logits;                     // [batch, vocab of the main model] dtype, contiguous: in and out
  float* fused;     // [batch, k of the main model] the candidates' new logits; on CUDA NaN for an id outside
                    // the vocabulary, which the CPU refuses
  int32_t* chosen;  // [batch]
  void* workspace;  // fuse_workspace(...) bytes
  int64_t batch;
  int64_t anchors;
  double learning_rate;  // above 0 to kMaxLearningRate
  float min_probability;
  int32_t steps;
  int32_t member_count;
  Dtype dtype;
  bool log_probs;
};

// Where the search's 0 lies: a token's logit and the search's value for it. Both are 0 without log_probs.
struct SearchOrigin {
  float logit;  // of the most probable token
  float value;  // its log-probability
};

// Differences first: they are exact where the logits are large and alike.
DEEPEN_HOST_DEVICE static inline float to_search(float logit, SearchOrigin origin) {
  return logit - origin.logit + origin.value;
}
DEEPEN_HOST_DEVICE static inline float from_search(float value, SearchOrigin origin) {
  return value - origin.value + origin.logit;
}

size_t fuse_workspace(const FuseMember& main, int64_t batch, int64_t anchors, const Backend& backend);

// Throws ArgumentError where one is out of range. `fuse` does it too.
void check_search_settings(double learning_rate, int32_t steps, float min_probability);

void fuse(const FuseParams& params, const Backend& backend);

// fuse.cu; params were checked, `schedule` has params.steps entries in host memory.
size_t fuse_cuda_workspace(const FuseMember& main, int64_t batch, int64_t anchors);
void fuse_cuda(const FuseParams& params, const AdamStep* schedule, const Backend& backend);

DEEPEN_DECLARE_CPU(void fuse_row(const FuseParams& params, const AdamStep* schedule, int64_t row,
                                 char* workspace))

}  // namespace deepen
