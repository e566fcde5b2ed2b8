// A member's relative rows as the operations see them.
//
// Sparse: token t has values[t, j] on anchor columns[t, j]; the anchors it does not name share rest[t]
// evenly. A column of -1 ends a row that names fewer than `entries` anchors. Dense: columns and rest are
// null, entries = anchors.
#pragma once

#include <cstdint>

#include "core/host_device.h"

namespace deepen {

struct RelativeRows {
  const int32_t* columns;  // [vocab, entries], all different within a row, values sorted down; or null
  const float* values;     // [vocab, entries]
  const float* rest;       // [vocab], or null
  int64_t vocab;
  int64_t entries;
};

static inline DEEPEN_HOST_DEVICE bool is_dense(const RelativeRows& rows) { return rows.columns == nullptr; }

static inline DEEPEN_HOST_DEVICE int64_t row_length(const RelativeRows& rows, int64_t token) {
  const int32_t* columns = rows.columns + token * rows.entries;
  int64_t length = 0;
  while (length < rows.entries && columns[length] >= 0) ++length;
  return length;
}

// What each anchor the row does not name gets: u_t = rest_t / (|A| - entries of t).
static inline DEEPEN_HOST_DEVICE float uniform_share(const RelativeRows& rows, int64_t token, int64_t length,
                                                     int64_t anchors) {
  return length < anchors ? rows.rest[token] / float(anchors - length) : 0.0f;
}

}  // namespace deepen
