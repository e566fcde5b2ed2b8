// Looks at the token ids and columns that a caller gives a CPU operation, before anything is written: one
// pass over what the kernel is about to read anyway. CUDA kernels leave out what is out of range instead,
// since the host does not read device memory.
#pragma once

#include <cstdint>

#include "core/check.h"
#include "ops/relative_map.h"

namespace deepen {

// Tables of columns are indexed and sized by 32-bit integers.
inline void check_search_size(const RelativeRows& rows, int64_t candidates, int64_t anchors) {
  DEEPEN_CHECK(anchors < (1 << 30), "there are ", anchors, " anchors; a search takes up to 2^30");
  DEEPEN_CHECK(is_dense(rows) || candidates <= ((1 << 29) - 1) / rows.entries, "the search has ", candidates,
               " candidates with ", rows.entries, " entries; it takes up to 2^29 entries a row");
}

inline void check_token_ids(const int32_t* ids, int64_t count, int64_t vocab, int member) {
  for (int64_t t = 0; t < count; ++t) {
    DEEPEN_CHECK(ids[t] >= 0 && ids[t] < vocab, "token ", ids[t], " of member ", member,
                 " is outside its rows' ", vocab, " tokens; give the ids of a row whose status is 0");
  }
}

// The rows of these tokens, whose ids were checked.
inline void check_columns(const RelativeRows& rows, const int32_t* ids, int64_t count, int64_t anchors,
                          int member) {
  if (is_dense(rows)) return;
  // Rows lie anywhere in memory, and the model's forward pass has had the caches: all are asked for at once.
  for (int64_t t = 0; t < count; ++t) {
    const int64_t row = int64_t(ids[t]) * rows.entries;
    __builtin_prefetch(rows.rest + ids[t]);
    for (int64_t j = 0; j < rows.entries; j += 16) {
      __builtin_prefetch(rows.columns + row + j);
      __builtin_prefetch(rows.values + row + j);
    }
    __builtin_prefetch(rows.columns + row + rows.entries - 1);
    __builtin_prefetch(rows.values + row + rows.entries - 1);
  }
  for (int64_t t = 0; t < count; ++t) {
    const int32_t* columns = rows.columns + int64_t(ids[t]) * rows.entries;
    int32_t largest = -1;  // without an early exit, so that it is a few vector instructions
    for (int64_t j = 0; j < rows.entries; ++j) largest = columns[j] > largest ? columns[j] : largest;
    if (largest < anchors) continue;
    const int64_t length = row_length(rows, ids[t]);  // what comes after the end of a row is never read
    for (int64_t j = 0; j < length; ++j) {
      DEEPEN_CHECK(columns[j] < anchors, "the row of token ", ids[t], " of member ", member, " names anchor ",
                   columns[j], " of ", anchors, "; make the rows again");
    }
  }
}

}  // namespace deepen
