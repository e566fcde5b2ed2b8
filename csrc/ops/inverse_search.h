// inverse_search: main-model logits whose relative representation is near a target (DeePEn, section 3.4).
//
//   for t in 0 .. steps-1:
//     p   = softmax(z over the candidates and the tail)        the tail keeps its logit
//     r_a = sum_t p_t R[t, a]                                  the tail's row is uniform, 1/|A|
//     L   = sum_a target_a (log target_a - log r_a) / |A|      KL divergence, mean over the anchors
//     g_t = dL/dz_t = -(p_t / |A|) (h_t - sum_s p_s h_s),      h_t = sum_a R[t, a] target_a / r_a
//     z   = AdamW(z, g)                                        adamw.h
//
// Rows of a batch are independent. Nothing of size |A| is touched for sparse rows except `target` at their
// columns.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/backend.h"
#include "core/isa.h"
#include "ops/adamw.h"
#include "ops/relative_map.h"

namespace deepen {

struct InverseSearchParams {
  const float* logits;  // [batch, candidates]
  const int32_t* ids;   // [batch, candidates] the candidates' token ids
  const float*
      tail_logit;       // [batch] log of the summed exp(logit) of all other tokens; -inf if there are none
  const float* target;  // [batch, anchors], each row sums to 1
  float* found;         // [batch, candidates] the resulting logits; NaN as in fuse.h for an id out of range
  void* workspace;      // inverse_search_workspace(...) bytes
  RelativeRows rows;    // of the main model
  int64_t batch;
  int64_t candidates;
  int64_t anchors;
  double learning_rate;  // above 0 to kMaxLearningRate
  int32_t steps;
};

size_t inverse_search_workspace(const RelativeRows& rows, int64_t batch, int64_t candidates, int64_t anchors,
                                const Backend& backend);

void inverse_search(const InverseSearchParams& params, const Backend& backend);

// inverse_search.cu; params were checked, `schedule` has params.steps entries in host memory.
size_t inverse_search_cuda_workspace(const RelativeRows& rows, int64_t batch, int64_t candidates,
                                     int64_t anchors);
void inverse_search_cuda(const InverseSearchParams& params, const AdamStep* schedule, const Backend& backend);

DEEPEN_DECLARE_CPU(void inverse_search_row(const InverseSearchParams& params, const AdamStep* schedule,
                                           int64_t row, char* workspace))

}  // namespace deepen
