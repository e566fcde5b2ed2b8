// relative_rows: the similarity rows of some tokens, cut to their largest entries (DeePEn, section 3.2).
//
//   c[a]  = cos(E[t] - mean, E[anchor a] - mean)        mean = 0 without centring
//   s     = temperature * c, or temperature * c / ||c||_2 with `normalise` (the paper's recipe)
//   row   = softmax(s) over all anchors
//   columns[n, :], values[n, :] = its `entries` largest, sorted down, ties to the lower column; rest[n] = 1 -
//   their sum
//
// The last two lines are topk_softmax of s. The embedding is read where the model keeps it, in its own dtype;
// nothing of its size is allocated.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/backend.h"
#include "core/dtype.h"
#include "core/isa.h"

namespace deepen {

struct RelativeRowsParams {
  const void* embedding;             // [vocab, dim] dtype, contiguous
  const int64_t* tokens;             // [count]
  const int64_t* anchor_ids;         // [anchors]
  const float* mean;                 // [dim], or null for no centring
  const float* anchor_inverse_norm;  // [anchors] 1 / ||E[anchor a] - mean||_2, 0 where the norm is 0
  int32_t* columns;                  // [count, entries]
  float* values;                     // [count, entries]
  float* rest;                       // [count]
  int32_t* status;                   // [count] RowStatus: kRowNotFinite if an embedding has NaN or infinity
  void* workspace;                   // relative_rows_workspace(...) bytes
  int64_t vocab;
  int64_t dim;
  int64_t count;
  int64_t anchors;
  int64_t entries;
  float temperature;
  bool normalise;
  Dtype dtype;
};

size_t relative_rows_workspace(int64_t dim, int64_t anchors, int64_t entries, int64_t count,
                               const Backend& backend);

void relative_rows(const RelativeRowsParams& params, const Backend& backend);

// relative_rows.cu; params were checked, but for the ids, which the host does not read.
size_t relative_rows_cuda_workspace(int64_t dim, int64_t anchors, int64_t entries, int64_t count,
                                    const Backend& backend);
void relative_rows_cuda(const RelativeRowsParams& params, const Backend& backend);

// Tokens are done kTokenBlock at a time: their centred, normalised embeddings stay in cache while the anchors
// stream by once for all of them.
constexpr int64_t kTokenBlock = 64;

struct RelativeRowsBlock {
  int64_t first, count;  // which of params.tokens
  float* queries;        // [kTokenBlock, dim]
  float* offsets;        // [kTokenBlock] query . mean
  float* scores;         // [kTokenBlock, anchors]
  uint64_t* keys;        // [threads, topk_softmax_keys]
};

DEEPEN_DECLARE_CPU(void prepare_queries(const RelativeRowsParams& params, const RelativeRowsBlock& block))
DEEPEN_DECLARE_CPU(void score_anchors(const RelativeRowsParams& params, const RelativeRowsBlock& block,
                                      int64_t begin, int64_t end))
DEEPEN_DECLARE_CPU(void finish_row(const RelativeRowsParams& params, const RelativeRowsBlock& block,
                                   int64_t n, uint64_t* keys))

}  // namespace deepen
