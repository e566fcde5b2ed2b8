// CPU twin of fuse. Only anchors that a candidate's row names matter one by one; the target's mass on all the
// others enters the search as one number. So an assistant's entry costs one hash look-up, and nothing is |A|
// long (with dense rows everything is).
#include <cmath>

#include "core/simd.h"
#include "ops/fuse.h"
#include "ops/search_row.h"

namespace deepen {
namespace DEEPEN_ISA {

// How many of a member's tokens count; the others' probability goes to `tail`.
static int64_t counted_tokens(const FuseMember& member, int64_t b, float min_probability, float* tail) {
  const float* probs = member.probs + b * member.k;
  int64_t counted = member.k;
  float rest = 0.0f;
  while (counted > 1 && probs[counted - 1] < min_probability) rest += probs[--counted];
  *tail = member.tail[b] + rest;
  return counted;
}

// Adds weight * r_i to the target over the numbered anchors. Returns through `outside` what its rows put on
// anchors that have no number, through `base` what every anchor gets alike.
static void add_sparse(const FuseMember& member, int64_t b, int64_t counted, float tail, float weight,
                       const SearchRow& row, float* outside, float* base) {
  const int32_t* ids = member.ids + b * member.k;
  const float* probs = member.probs + b * member.k;
  *base += weight * tail / float(row.anchors);
  for (int64_t t = 0; t < counted; ++t) {
    const int64_t token = ids[t];
    const float share_of_target = weight * probs[t];
    const int64_t length = row_length(member.rows, token);
    const float uniform = uniform_share(member.rows, token, length, row.anchors);
    const int32_t* columns = member.rows.columns + token * member.rows.entries;
    const float* values = member.rows.values + token * member.rows.entries;
    *base += share_of_target * uniform;
    for (int64_t j = 0; j < length; ++j) {
      const int32_t number = find(row.columns, columns[j]);
      const float mass = share_of_target * (values[j] - uniform);
      if (number >= 0) {
        row.target[number] += mass;
      } else {
        *outside += mass;
      }
    }
  }
}

static void add_dense(const FuseMember& member, int64_t b, int64_t counted, float tail, float weight,
                      const SearchRow& row) {
  const int64_t anchors = row.anchors, whole = anchors / kWidth * kWidth;
  const float base = weight * tail / float(anchors);
  for (int64_t a = 0; a < anchors; ++a) row.target[a] += base;
  for (int64_t t = 0; t < counted; ++t) {
    const float* values = member.rows.values + int64_t(member.ids[b * member.k + t]) * anchors;
    const float share = weight * member.probs[b * member.k + t];
    const Vec shares = broadcast(share);
    for (int64_t a = 0; a < whole; a += kWidth)
      store(row.target + a, load(row.target + a) + shares * load(values + a));
    for (int64_t a = whole; a < anchors; ++a) row.target[a] += share * values[a];
  }
}

template <class T>
static void write_back(const FuseParams& params, const SearchRow& row, SearchOrigin origin, int64_t b,
                       T* logits) {
  const FuseMember& main = params.members[0];
  const int64_t vocab = main.rows.vocab;
  const int32_t* ids = main.ids + b * main.k;
  float* fused = params.fused + b * main.k;
  const float lowest = to_float(logits[ids[main.k - 1]]);  // no token outside the top k is above it
  for (int64_t t = 0; t < main.k; ++t) {
    fused[t] = t < row.candidates ? from_search(row.logits[t], origin) : to_float(logits[ids[t]]);
    from_float(fused[t], &logits[ids[t]]);
  }
  int64_t best = 0;
  for (int64_t t = 1; t < main.k; ++t) {
    const float here = to_float(logits[ids[t]]), there = to_float(logits[ids[best]]);
    if (here > there || (here == there && ids[t] < ids[best])) best = t;
  }
  int64_t chosen = ids[best];
  // Only if every candidate fell to the others' level can one of those win.
  if (main.k < vocab && to_float(logits[chosen]) <= lowest) {
    for (int64_t id = 0; id < vocab; ++id) {
      const float here = to_float(logits[id]), there = to_float(logits[chosen]);
      if (here > there || (here == there && id < chosen)) chosen = id;
    }
  }
  params.chosen[b] = int32_t(chosen);
}

template <class T>
static void fuse_typed(const FuseParams& params, const AdamStep* schedule, int64_t b, char* workspace) {
  const FuseMember& main = params.members[0];
  T* logits = static_cast<T*>(params.logits) + b * main.rows.vocab;
  Arena arena{workspace};
  SearchRow row = take_search_row(arena, main.rows, main.k, params.anchors);
  row.ids = main.ids + b * main.k;
  float main_tail;
  row.candidates = counted_tokens(main, b, params.min_probability, &main_tail);
  const SearchOrigin origin = params.log_probs
                                  ? SearchOrigin{to_float(logits[row.ids[0]]), logf(main.probs[b * main.k])}
                                  : SearchOrigin{0.0f, 0.0f};
  for (int64_t t = 0; t < row.candidates; ++t)
    row.logits[t] = to_search(to_float(logits[row.ids[t]]), origin);
  // log sum exp of the whole row follows from any token's logit and probability; take the largest.
  row.tail_logit = row.logits[0] - logf(main.probs[b * main.k]) + logf(main_tail);

  const bool dense = is_dense(main.rows);
  if (!dense) number_columns(&row);
  const int64_t width = dense ? params.anchors : row.columns.size;
  for (int64_t a = 0; a < width; ++a) row.target[a] = 0.0f;
  float outside = 0.0f, base = 0.0f;
  for (int32_t i = 0; i < params.member_count; ++i) {
    const FuseMember& member = params.members[i];
    const float weight = params.weights[b * params.member_count + i];
    if (weight == 0.0f) continue;
    float tail;
    const int64_t counted = counted_tokens(member, b, params.min_probability, &tail);
    if (dense) {
      add_dense(member, b, counted, tail, weight, row);
    } else {
      add_sparse(member, b, counted, tail, weight, row, &outside, &base);
    }
  }
  if (!dense) {
    for (int64_t a = 0; a < width; ++a) row.target[a] += base;
    row.target_outside = outside + base * float(params.anchors - width);
  }

  search(&row, schedule, params.steps);
  write_back(params, row, origin, b, logits);
}

void fuse_row(const FuseParams& params, const AdamStep* schedule, int64_t row, char* workspace) {
  switch (params.dtype) {
    case Dtype::f32: return fuse_typed<float>(params, schedule, row, workspace);
    case Dtype::f16: return fuse_typed<Half>(params, schedule, row, workspace);
    case Dtype::bf16: return fuse_typed<BFloat16>(params, schedule, row, workspace);
  }
}

}  // namespace DEEPEN_ISA
}  // namespace deepen
