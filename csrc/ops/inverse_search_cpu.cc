// CPU twin of inverse_search. With sparse rows one step costs two passes over the candidates' entries (128 x
// 32 by default), a scatter for r and a gather for h.
#include <cmath>

#include "core/simd.h"
#include "ops/inverse_search.h"
#include "ops/search_row.h"

namespace deepen {
namespace DEEPEN_ISA {

// Keeps target / r finite where r underflows; there the true gradient is nil anyway.
static const float kSmallestRelative = 1e-30f;

void number_columns(SearchRow* row) {
  clear(&row->columns);
  int32_t used = 0;
  for (int64_t t = 0; t < row->candidates; ++t) {
    const int64_t token = row->ids[t];
    const int64_t length = row_length(row->rows, token);
    const int32_t* columns = row->rows.columns + token * row->rows.entries;
    const float* values = row->rows.values + token * row->rows.entries;
    const float share = uniform_share(row->rows, token, length, row->anchors);
    row->offsets[t] = used;
    row->uniform[t] = share;
    for (int64_t j = 0; j < length; ++j, ++used) {
      row->numbers[used] = number_of(&row->columns, columns[j]);
      row->excess[used] = values[j] - share;
    }
  }
  row->offsets[row->candidates] = used;
}

// probs = softmax over candidates and tail; returns the tail's probability.
static float candidate_softmax(SearchRow* row) {
  float largest = row->tail_logit;
  for (int64_t t = 0; t < row->candidates; ++t) largest = row->logits[t] > largest ? row->logits[t] : largest;
  float tail = expf(row->tail_logit - largest);
  float sum = tail;
  const int64_t whole = row->candidates / kWidth * kWidth;
  Vec sums = Vec{};
  for (int64_t t = 0; t < whole; t += kWidth) {
    const Vec e = exp(load(row->logits + t) - broadcast(largest));
    store(row->probs + t, e);
    sums += e;
  }
  for (int64_t t = whole; t < row->candidates; ++t) {
    row->probs[t] = expf(row->logits[t] - largest);
    sum += row->probs[t];
  }
  const float scale = 1.0f / (sum + sum_lanes(sums));
  for (int64_t t = 0; t < row->candidates; ++t) row->probs[t] *= scale;
  return tail * scale;
}

// target / r - 1 in place of r, for `count` anchors; returns the sum. Because a row's entries sum to 1, the 1
// drops out of h_t - sum_s p_s h_s; leaving it out saves the digits it would cost where r is near the target.
static float relative_error(const float* target, float* relative, int64_t count) {
  const int64_t whole = count / kWidth * kWidth;
  Vec sums = Vec{};
  for (int64_t a = 0; a < whole; a += kWidth) {
    const Vec r = max(load(relative + a), broadcast(kSmallestRelative));
    const Vec w = (load(target + a) - r) / r;
    store(relative + a, w);
    sums += w;
  }
  float sum = sum_lanes(sums);
  for (int64_t a = whole; a < count; ++a) {
    const float r = relative[a] > kSmallestRelative ? relative[a] : kSmallestRelative;
    relative[a] = (target[a] - r) / r;
    sum += relative[a];
  }
  return sum;
}

// h_t - 1 for all candidates into row->pull; returns that of the tail.
static float pull_sparse(SearchRow* row, float tail) {
  float base = tail / float(row->anchors);  // what an anchor nobody names has
  for (int64_t t = 0; t < row->candidates; ++t) base += row->probs[t] * row->uniform[t];

  const int64_t touched = row->columns.size;
  float* relative = row->relative;
  for (int64_t a = 0; a < touched; ++a) relative[a] = base;
  for (int64_t t = 0; t < row->candidates; ++t) {
    const float p = row->probs[t];
    for (int32_t j = row->offsets[t]; j < row->offsets[t + 1]; ++j)
      relative[row->numbers[j]] += p * row->excess[j];
  }

  float error_sum = relative_error(row->target, relative, touched);
  const float outside = base > kSmallestRelative ? base : kSmallestRelative;
  // Where every anchor is touched target_outside is rounding alone, and the base may be tiny.
  if (row->anchors > touched) error_sum += row->target_outside / outside - float(row->anchors - touched);
  for (int64_t t = 0; t < row->candidates; ++t) {
    int32_t j = row->offsets[t];
    const int32_t end = row->offsets[t + 1];
    Vec sums = Vec{};
    for (; j + kWidth <= end; j += kWidth) sums += load(row->excess + j) * gather(relative, row->numbers + j);
    float h = end - row->offsets[t] >= kWidth ? sum_lanes(sums) : 0.0f;
    for (; j < end; ++j) h += row->excess[j] * relative[row->numbers[j]];
    row->pull[t] = h + row->uniform[t] * error_sum;
  }
  return error_sum / float(row->anchors);
}

static float pull_dense(SearchRow* row, float tail) {
  const int64_t anchors = row->anchors, whole = anchors / kWidth * kWidth;
  float* relative = row->relative;
  const float base = tail / float(anchors);
  for (int64_t a = 0; a < anchors; ++a) relative[a] = base;
  for (int64_t t = 0; t < row->candidates; ++t) {
    const float* values = row->rows.values + row->ids[t] * anchors;
    const float p = row->probs[t];
    const Vec ps = broadcast(p);
    for (int64_t a = 0; a < whole; a += kWidth)
      store(relative + a, load(relative + a) + ps * load(values + a));
    for (int64_t a = whole; a < anchors; ++a) relative[a] += p * values[a];
  }
  const float error_sum = relative_error(row->target, relative, anchors);
  for (int64_t t = 0; t < row->candidates; ++t) {
    const float* values = row->rows.values + row->ids[t] * anchors;
    Vec sums = Vec{};
    for (int64_t a = 0; a < whole; a += kWidth) sums += load(values + a) * load(relative + a);
    float h = sum_lanes(sums);
    for (int64_t a = whole; a < anchors; ++a) h += values[a] * relative[a];
    row->pull[t] = h;
  }
  return error_sum / float(anchors);
}

void search(SearchRow* row, const AdamStep* schedule, int steps) {
  const int64_t candidates = row->candidates;
  for (int64_t t = 0; t < candidates; ++t) row->first[t] = row->second[t] = 0.0f;
  for (int step = 0; step < steps; ++step) {
    const float tail = candidate_softmax(row);
    const float tail_pull = is_dense(row->rows) ? pull_dense(row, tail) : pull_sparse(row, tail);
    float mean = tail * tail_pull;
    for (int64_t t = 0; t < candidates; ++t) mean += row->probs[t] * row->pull[t];
    const float scale = 1.0f / float(row->anchors);
    const AdamStep now = schedule[step];
    for (int64_t t = 0; t < candidates; ++t) {
      const float gradient = -(row->probs[t] * scale) * (row->pull[t] - mean);
      adam_update(gradient, now, &row->first[t], &row->second[t], &row->logits[t]);
    }
  }
}

void inverse_search_row(const InverseSearchParams& params, const AdamStep* schedule, int64_t b,
                        char* workspace) {
  Arena arena{workspace};
  SearchRow row = take_search_row(arena, params.rows, params.candidates, params.anchors);
  row.ids = params.ids + b * params.candidates;
  row.tail_logit = params.tail_logit[b];
  const float* logits = params.logits + b * params.candidates;
  for (int64_t t = 0; t < params.candidates; ++t) row.logits[t] = logits[t];

  const float* target = params.target + b * params.anchors;
  if (is_dense(params.rows)) {
    for (int64_t a = 0; a < params.anchors; ++a) row.target[a] = target[a];
  } else {
    number_columns(&row);
    double inside = 0.0;
    for (int32_t slot = 0; slot < row.columns.capacity; ++slot) {
      if (row.columns.columns[slot] < 0) continue;
      const float value = target[row.columns.columns[slot]];
      row.target[row.columns.numbers[slot]] = value;
      inside += double(value);
    }
    row.target_outside = inside < 1.0 ? float(1.0 - inside) : 0.0f;
  }

  search(&row, schedule, params.steps);
  float* found = params.found + b * params.candidates;
  for (int64_t t = 0; t < params.candidates; ++t) found[t] = row.logits[t];
}

}  // namespace DEEPEN_ISA
}  // namespace deepen
