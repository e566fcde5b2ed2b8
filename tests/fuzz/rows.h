// Relative rows for the targets of the search: sound ones, and ones with wrong columns and hostile values.
#pragma once

#include "input.h"
#include "ops/relative_map.h"

namespace fuzz {

struct Rows {
  Buffer<int32_t> columns;
  Buffer<float> values, rest;
  int64_t vocab, entries;
  bool dense;

  deepen::RelativeRows view() {
    return {dense ? nullptr : columns.data(), values.data(), dense ? nullptr : rest.data(), vocab, entries};
  }
};

// Each row sums to 1. Most name less than `entries` anchors.
inline Rows sound_rows(Input* in, int64_t vocab, int64_t anchors, bool dense) {
  const int64_t entries = dense ? anchors : 1 + in->below(anchors < 40 ? anchors : 40);
  Rows rows{Buffer<int32_t>(dense ? 0 : vocab * entries),
            Buffer<float>(vocab * entries),
            Buffer<float>(dense ? 0 : vocab),
            vocab,
            entries,
            dense};
  uint32_t state = in->word();
  for (int64_t token = 0; token < vocab; ++token) {
    state = state * 1664525u + 1013904223u;
    const int64_t length = dense ? entries : int64_t(state >> 8) % (entries + 1);
    float left = 1.0f;
    for (int64_t j = 0; j < entries; ++j) {
      const bool last = dense && j == entries - 1;
      const float value = j < length ? (last ? left : left * 0.4f) : 0.0f;
      left -= value;
      rows.values[token * entries + j] = value;
      if (!dense) rows.columns[token * entries + j] = j < length ? int32_t((state % 97 + j) % anchors) : -1;
    }
    if (!dense) rows.rest[token] = left;
    // Nobody is left to take the rest.
    if (!dense && length == anchors) rows.values[token * entries] += left, rows.rest[token] = 0.0f;
  }
  return rows;
}

// Hostile values, and columns of all kinds.
inline void spoil(Input* in, Rows* rows, int64_t anchors) {
  static const int32_t odd[] = {-1, -2, 0, INT32_MAX, INT32_MIN};
  for (int64_t i = 1 + in->below(6); i > 0; --i) {
    const int64_t at = int64_t(in->word()) % rows->values.count;
    switch (in->below(3)) {
      case 0: rows->values[at] = in->hostile(); break;
      case 1:
        if (!rows->dense) rows->rest[at % rows->vocab] = in->hostile();
        break;
      default:
        if (!rows->dense) rows->columns[at] = in->one_in(3) ? int32_t(anchors) : odd[in->below(5)];
    }
  }
}

inline double rate(Input* in) { return in->one_in(8) ? in->hostile_double() : 0.15; }

inline int32_t steps(Input* in) {
  static const int32_t odd[] = {64, 65, -1, INT32_MAX, INT32_MIN};
  return in->one_in(8) ? odd[in->below(5)] : int32_t(in->below(7));
}

}  // namespace fuzz
