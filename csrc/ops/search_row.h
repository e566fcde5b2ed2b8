// The search over one row, shared by inverse_search and fuse on the CPU: the candidates' relative rows,
// numbered, and the workspace that T steps over them need.
#pragma once

#include <cstdint>

#include "core/arena.h"
#include "core/column_index.h"
#include "ops/adamw.h"
#include "ops/relative_map.h"

namespace deepen {

struct SearchRow {
  int64_t candidates;
  int64_t anchors;
  float* logits;  // [candidates] in and out
  float tail_logit;
  RelativeRows rows;
  const int32_t* ids;  // [candidates]

  // Sparse rows: the touched anchors are numbered 0..touched-1 (columns.size), and a row is its excess over
  // u_t.
  ColumnIndex columns;
  int32_t* offsets;      // [candidates + 1] into numbers and excess
  int32_t* numbers;      // [candidates * entries]
  float* excess;         // [candidates * entries] value - u_t
  float* uniform;        // [candidates] u_t
  float target_outside;  // the target's mass on anchors no candidate names

  // Dense rows use the same arrays with an index that is the column itself.
  float* target;    // [touched] or [anchors]
  float* relative;  // likewise: r, then target / r - 1
  float* probs;     // [candidates]
  float* pull;      // [candidates] h - 1
  float* first;     // [candidates] AdamW's moments
  float* second;    // [candidates]
};

static inline SearchRow take_search_row(Arena& arena, const RelativeRows& rows, int64_t candidates,
                                        int64_t anchors) {
  SearchRow row{};
  row.candidates = candidates;
  row.anchors = anchors;
  row.rows = rows;
  int64_t width = anchors;
  if (!is_dense(rows)) {
    const int64_t entries = candidates * rows.entries;
    width = entries < anchors ? entries : anchors;
    row.columns.capacity = column_index_capacity(width);
    row.columns.columns = take<int32_t>(arena, row.columns.capacity);
    row.columns.numbers = take<int32_t>(arena, row.columns.capacity);
    row.offsets = take<int32_t>(arena, candidates + 1);
    row.numbers = take<int32_t>(arena, entries);
    row.excess = take<float>(arena, entries);
    row.uniform = take<float>(arena, candidates);
  }
  row.logits = take<float>(arena, candidates);
  row.target = take<float>(arena, width);
  row.relative = take<float>(arena, width);
  row.probs = take<float>(arena, candidates);
  row.pull = take<float>(arena, candidates);
  row.first = take<float>(arena, candidates);
  row.second = take<float>(arena, candidates);
  return row;
}

#ifdef DEEPEN_ISA
namespace DEEPEN_ISA {

// Numbers the columns of rows.candidates tokens and stores their excess; sparse rows only.
void number_columns(SearchRow* row);

// T steps on row->logits. row->target (and target_outside, for sparse rows) must be set.
void search(SearchRow* row, const AdamStep* schedule, int steps);

}  // namespace DEEPEN_ISA
#endif

}  // namespace deepen
