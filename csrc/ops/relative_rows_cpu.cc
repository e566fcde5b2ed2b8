// CPU twin of relative_rows: anchors stream by once for each block of tokens. (e_t - m).(e_a - m) is taken as
// q.e_a - q.m with q = (e_t - m) / ||e_t - m||, so that the anchors' embeddings need no centred copy.
#include <cmath>

#include "core/select.h"
#include "core/simd.h"
#include "ops/relative_rows.h"

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

template <class T, int kTokens>
static void score_tokens(const T* embedding, const RelativeRowsParams& params, const RelativeRowsBlock& block,
                         int64_t first, int64_t begin, int64_t end) {
  const int64_t dim = params.dim, whole = dim / kWidth * kWidth;
  const float* queries = block.queries + first * dim;
  for (int64_t a = begin; a < end; ++a) {
    const T* anchor = embedding + params.anchor_ids[a] * dim;
    Vec sums[kTokens] = {};
    for (int64_t i = 0; i < whole; i += kWidth) {
      const Vec e = load(anchor + i);
      for (int n = 0; n < kTokens; ++n) sums[n] += load(queries + n * dim + i) * e;
    }
    for (int n = 0; n < kTokens; ++n) {
      float dot = sum_lanes(sums[n]);
      for (int64_t i = whole; i < dim; ++i) dot += queries[n * dim + i] * to_float(anchor[i]);
      block.scores[(first + n) * params.anchors + a] =
          (dot - block.offsets[first + n]) * params.anchor_inverse_norm[a];
    }
  }
}

template <class T>
static void score(const T* embedding, const RelativeRowsParams& params, const RelativeRowsBlock& block,
                  int64_t begin, int64_t end) {
  // A slice of anchors small enough to stay in cache while the block's tokens pass over it.
  constexpr int64_t kSlice = 64;
  for (int64_t slice = begin; slice < end; slice += kSlice) {
    const int64_t stop = slice + kSlice < end ? slice + kSlice : end;
    int64_t n = 0;
    for (; n + 4 <= block.count; n += 4) score_tokens<T, 4>(embedding, params, block, n, slice, stop);
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

void finish_row(const RelativeRowsParams& params, const RelativeRowsBlock& block, int64_t n) {
  const int64_t anchors = params.anchors, entries = params.entries, whole = anchors / kWidth * kWidth;
  const float* scores = block.scores + n * anchors;
  uint64_t* keys = block.keys + n * anchors;

  Vec maxima = broadcast(scores[0]);
  double square = 0.0;
  float largest = scores[0];
  for (int64_t a = 0; a < whole; a += kWidth) maxima = max(load(scores + a), maxima);
  for (int64_t a = whole; a < anchors; ++a) largest = scores[a] > largest ? scores[a] : largest;
  largest = max_lanes(max(maxima, broadcast(largest)));
  if (params.normalise) {
    for (int64_t a = 0; a < anchors; ++a) square += double(scores[a]) * double(scores[a]);
  }
  const float factor = params.normalise
                           ? (square > 0.0 ? float(double(params.temperature) / std::sqrt(square)) : 0.0f)
                           : params.temperature;

  const Vec factors = broadcast(factor), shift = broadcast(largest);
  double sum = 0.0;
  constexpr int64_t kRun = 64 * kWidth;  // float partial sums this short lose nothing that matters
  for (int64_t run = 0; run < whole; run += kRun) {
    const int64_t stop = run + kRun < whole ? run + kRun : whole;
    Vec sums = Vec{};
    for (int64_t a = run; a < stop; a += kWidth) sums += exp((load(scores + a) - shift) * factors);
    sum += double(sum_lanes(sums));
  }
  for (int64_t a = whole; a < anchors; ++a) sum += double(expf((scores[a] - largest) * factor));

  for (int64_t a = 0; a < anchors; ++a) keys[a] = pack_key(scores[a], uint32_t(a));
  keep_largest(keys, anchors, entries);
  sort_down(keys, entries);
  int32_t* columns = params.columns + (block.first + n) * entries;
  float* values = params.values + (block.first + n) * entries;
  double kept = 0.0;
  for (int64_t j = 0; j < entries; ++j) {
    const double value = double(expf((key_value(keys[j]) - largest) * factor)) / sum;
    columns[j] = int32_t(key_index(keys[j]));
    values[j] = float(value);
    kept += value;
  }
  params.rest[block.first + n] = entries == anchors || kept >= 1.0 ? 0.0f : float(1.0 - kept);
}

}  // namespace DEEPEN_ISA
}  // namespace deepen
