// topk_softmax: the k most probable tokens of each row of logits, and what probability is left to the rest.
// One call takes the logits of several members, each with its own vocabulary, batch and dtype.
//
//   p = softmax(logits[b, :])
//   ids[b, :], probs[b, :] = the k largest p, sorted down, ties to the lower id
//   tail[b] = 1 - sum(probs[b, :])
//
// One read of the logits. -inf is probability 0. A row with NaN, +inf, or nothing but -inf has no softmax:
// its status says so and its outputs are unspecified.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/backend.h"
#include "core/dtype.h"
#include "core/isa.h"

namespace deepen {

enum RowStatus : int32_t { kRowOk = 0, kRowNotFinite = 1, kRowEmpty = 2 };

struct TopkSoftmaxParams {
  const void* logits;  // [batch, vocab] dtype, contiguous
  int32_t* ids;        // [batch, k]
  float* probs;        // [batch, k]
  float* tail;         // [batch]
  int32_t* status;     // [batch] RowStatus
  int64_t batch;
  int64_t vocab;
  int64_t k;
  Dtype dtype;
};

// Of the members only sizes and dtype are read.
size_t topk_softmax_workspace(const TopkSoftmaxParams* members, int64_t count, const Backend& backend);

// `workspace` has topk_softmax_workspace(...) bytes.
void topk_softmax(const TopkSoftmaxParams* members, int64_t count, void* workspace, const Backend& backend);

// topk_softmax.cu; params were checked.
size_t topk_softmax_cuda_workspace(const TopkSoftmaxParams* members, int64_t count);
void topk_softmax_cuda(const TopkSoftmaxParams* members, int64_t count, void* workspace,
                       const Backend& backend);

DEEPEN_DECLARE_CPU(void topk_softmax_row(const TopkSoftmaxParams& params, int64_t row, uint64_t* keys))

}  // namespace deepen
