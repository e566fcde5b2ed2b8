// CPU twin of relative_rows: anchors stream by once for each block of tokens. (e_t - m).(e_a - m) is taken as
// q.e_a - q.m with q = (e_t - m) / ||e_t - m||, so that the anchors' embeddings need no centred copy.
#include <cmath>

#include "core/simd.h"
#include "ops/relative_rows.h"
#include "ops/topk_softmax.h"

namespace deepen {
namespace DEEPEN_ISA {

template <class T>
static void prepare(const T* embedding, const RelativeRowsParams& params, const RelativeRowsBlock& block) {
  for (int64_t n = 0; n < block.count; ++n) {
    const T* token = embedding + params.tokens[block.first + n] * params.dim;
    float* query = block.queries + n * params.dim;
    double square = 0.0, offset = 0.0;
    for (int64_t i = 0; i < params.dim; ++i) {
      query[i] = to_float(token[i]) - (params.mean ? params.mean[i] : 0.0f);
      square += double(query[i]) * double(query[i]);
    }
    const float scale = square > 0.0 ? float(1.0 / std::sqrt(square)) : 0.0f;
    for (int64_t i = 0; i < params.dim; ++i) {
      query[i] *= scale;
      if (params.mean) offset += double(query[i]) * double(params.mean[i]);
    }
    block.offsets[n] = float(offset);
  }
}

// Dot products of kTokens queries with kAnchors anchors: each loaded vector is used several times in
// registers.
template <class T, int kTokens, int kAnchors>
static void score_tile(const T* embedding, const RelativeRowsParams& params, const RelativeRowsBlock& block,
                       int64_t first, int64_t a) {
  const int64_t dim = params.dim, whole = dim / kWidth * kWidth;
  const float* queries = block.queries + first * dim;
  const T* anchors[kAnchors];
  for (int j = 0; j < kAnchors; ++j) anchors[j] = embedding + params.anchor_ids[a + j] * dim;
  Vec sums[kTokens][kAnchors] = {};
  for (int64_t i = 0; i < whole; i += kWidth) {
    Vec e[kAnchors];
    for (int j = 0; j < kAnchors; ++j) e[j] = load(anchors[j] + i);
    for (int n = 0; n < kTokens; ++n) {
      const Vec q = load(queries + n * dim + i);
      for (int j = 0; j < kAnchors; ++j) sums[n][j] += q * e[j];
    }
  }
  for (int n = 0; n < kTokens; ++n) {
    for (int j = 0; j < kAnchors; ++j) {
      float dot = sum_lanes(sums[n][j]);
      for (int64_t i = whole; i < dim; ++i) dot += queries[n * dim + i] * to_float(anchors[j][i]);
      block.scores[(first + n) * params.anchors + a + j] =
          (dot - block.offsets[first + n]) * params.anchor_inverse_norm[a + j];
    }
  }
}

// 16 accumulators fit the registers of AVX-512, 8 those of the others.
constexpr int kTileTokens = 4, kTileAnchors = kWidth == 16 ? 4 : 2;

template <class T, int kTokens>
static void score_tokens(const T* embedding, const RelativeRowsParams& params, const RelativeRowsBlock& block,
                         int64_t first, int64_t begin, int64_t end) {
  int64_t a = begin;
  for (; a + kTileAnchors <= end; a += kTileAnchors) {
    score_tile<T, kTokens, kTileAnchors>(embedding, params, block, first, a);
  }
  for (; a < end; ++a) score_tile<T, kTokens, 1>(embedding, params, block, first, a);
}

template <class T>
static void score(const T* embedding, const RelativeRowsParams& params, const RelativeRowsBlock& block,
                  int64_t begin, int64_t end) {
  // A slice of anchors small enough to stay in cache while the block's tokens pass over it.
  constexpr int64_t kSlice = 32;
  for (int64_t slice = begin; slice < end; slice += kSlice) {
    const int64_t stop = slice + kSlice < end ? slice + kSlice : end;
    int64_t n = 0;
    for (; n + kTileTokens <= block.count; n += kTileTokens) {
      score_tokens<T, kTileTokens>(embedding, params, block, n, slice, stop);
    }
    for (; n < block.count; ++n) score_tokens<T, 1>(embedding, params, block, n, slice, stop);
  }
}

void prepare_queries(const RelativeRowsParams& params, const RelativeRowsBlock& block) {
  switch (params.dtype) {
    case Dtype::f32: return prepare(static_cast<const float*>(params.embedding), params, block);
    case Dtype::f16: return prepare(static_cast<const Half*>(params.embedding), params, block);
    case Dtype::bf16: return prepare(static_cast<const BFloat16*>(params.embedding), params, block);
  }
}

void score_anchors(const RelativeRowsParams& params, const RelativeRowsBlock& block, int64_t begin,
                   int64_t end) {
  switch (params.dtype) {
    case Dtype::f32: return score(static_cast<const float*>(params.embedding), params, block, begin, end);
    case Dtype::f16: return score(static_cast<const Half*>(params.embedding), params, block, begin, end);
    case Dtype::bf16: return score(static_cast<const BFloat16*>(params.embedding), params, block, begin, end);
  }
}

void finish_row(const RelativeRowsParams& params, const RelativeRowsBlock& block, int64_t n, uint64_t* keys) {
  const int64_t anchors = params.anchors;
  float* scores = block.scores + n * anchors;
  float factor = params.temperature;
  if (params.normalise) {
    double square = 0.0;
    for (int64_t a = 0; a < anchors; ++a) square += double(scores[a]) * double(scores[a]);
    factor = square > 0.0 ? float(double(params.temperature) / std::sqrt(square)) : 0.0f;
  }
  for (int64_t a = 0; a < anchors; ++a) scores[a] *= factor;

  const int64_t to = block.first + n;
  const TopkSoftmaxParams row{scores,
                              params.columns + to * params.entries,
                              params.values + to * params.entries,
                              params.rest + to,
                              params.status + to,
                              1,
                              anchors,
                              params.entries,
                              Dtype::f32};
  topk_softmax_row(row, 0, keys);
}

}  // namespace DEEPEN_ISA
}  // namespace deepen
