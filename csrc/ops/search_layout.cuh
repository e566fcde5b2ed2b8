// Where the arrays of a search over one row lie: in shared memory if they fit, else in the caller's
// workspace.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "core/check.h"
#include "core/cuda.h"
#include "ops/anchor_groups.cuh"
#include "ops/anchor_index.cuh"
#include "ops/relative_map.h"

namespace deepen {

constexpr size_t kStaticSharedBytes = 2048;  // at least the kernels' own

// Where a row's arrays begin, in units of 16 bytes. Those of one brace share their memory, one after the
// other.
struct SearchLayout {
  uint32_t ids, logits, probs, pull, first, second;  // [candidates]
  uint32_t lengths, uniform;                         // [candidates], sparse
  uint32_t numbers, excess;                          // [candidates * pitch], sparse
  // { columns [candidates * pitch]; mass [2 * width]; target [width] and relative or bits [width] }
  uint32_t target, relative;
  int32_t bits_room;  // uint32s from `relative` on
  // { named, several [words] and before [2 * words]; starts [candidates * pitch / 2 + 1] and the groups
  // [candidates * pitch] }
  uint32_t named, several, before;
  uint32_t starts, group_candidates, group_excess;
  uint32_t short_anchors;  // [candidates * pitch / 2]
  uint32_t long_anchors;   // [candidates * pitch / (kShortEntries + 1)]
  size_t bytes;
  int32_t pitch, width, words;
};

// With room for `words` words of bits an anchor: 32 * words candidates are grouped in one pass.
template <bool kShared>
static inline SearchLayout search_layout_with(const RelativeRows& rows, int64_t candidates, int64_t anchors,
                                              int64_t words) {
  using Number = SearchNumber<kShared>;
  DEEPEN_CHECK(anchors < (1 << 30), "there are ", anchors, " anchors; a CUDA search takes up to 2^30");
  SearchLayout layout{};
  size_t used = 0;
  const auto reserve = [&](int64_t count, size_t size) {
    const size_t start = used;
    used += (size_t(count) * size + 15) / 16;
    return uint32_t(start);
  };
  for (uint32_t* array : {&layout.ids, &layout.logits, &layout.probs, &layout.pull, &layout.first,
                          &layout.second, &layout.lengths, &layout.uniform}) {
    *array = reserve(candidates, 4);
  }
  if (is_dense(rows)) {
    layout.width = int32_t(anchors);
    layout.target = reserve(anchors, 4);
    layout.relative = reserve(anchors, 4);
    layout.bytes = 16 * used;
    return layout;
  }
  const int64_t pitch = (rows.entries + 3) / 4 * 4, entries = candidates * pitch;
  DEEPEN_CHECK(entries < (1 << 28), "the search has ", candidates, " candidates with ", rows.entries,
               " entries; a CUDA search takes up to 2^28 entries a row");
  layout.pitch = int32_t(pitch);
  layout.width = int32_t(entries < anchors ? entries : anchors);
  layout.words = int32_t((anchors + 63) / 64);
  layout.numbers = reserve(entries, sizeof(Number));
  layout.excess = reserve(entries, 4);
  layout.short_anchors = reserve(entries / 2, sizeof(Number));
  layout.long_anchors = reserve(entries / (kShortEntries + 1), sizeof(Number));

  const size_t early = used;
  layout.starts = reserve(entries / 2 + 1, sizeof(Number));
  layout.group_candidates = reserve(entries, sizeof(Number));
  layout.group_excess = reserve(entries, 4);
  const size_t late = used;
  used = early;
  layout.named = reserve(layout.words, 8);
  layout.several = reserve(layout.words, 8);
  layout.before = reserve(2 * layout.words, sizeof(Number));
  used = late > used ? late : used;

  layout.target = reserve(layout.width, 4);
  layout.relative = uint32_t(used);
  const int64_t staged = entries - 4 * int64_t(layout.relative - layout.target);  // columns beyond the target
  layout.bits_room = int32_t(layout.width * words);
  if (int64_t(layout.bits_room) < staged) layout.bits_room = int32_t(staged);
  reserve(layout.bits_room, 4);
  layout.bytes = 16 * used;
  return layout;
}

// In shared memory with as few passes of group_entries as fit into `shared_bytes`, else in the workspace.
struct SearchPlace {
  SearchLayout layout;
  bool shared;
};
static inline SearchPlace search_place(const RelativeRows& rows, int64_t candidates, int64_t anchors,
                                       size_t shared_bytes) {
  for (int64_t words : {4, 2, 1}) {
    const SearchLayout layout = search_layout_with<true>(rows, candidates, anchors, words);
    if (layout.bytes <= shared_bytes) return {layout, true};
  }
  return {search_layout_with<false>(rows, candidates, anchors, 4), false};
}

// Rows of the workspace start at multiples of this.
static inline size_t search_row_bytes(const SearchLayout& layout) { return (layout.bytes + 127) / 128 * 128; }

// Which device it will run on, and so whether shared memory is enough, is not known here.
static inline size_t search_workspace(const RelativeRows& rows, int64_t batch, int64_t candidates,
                                      int64_t anchors) {
  return size_t(batch) * search_row_bytes(search_layout_with<false>(rows, candidates, anchors, 4));
}

template <bool kShared>
struct SearchState {
  AnchorIndex<SearchNumber<kShared>> index;  // of sparse rows
  int32_t candidates;
  int32_t* ids;  // -1 for one outside the vocabulary, as of a row whose top-k failed
  float *logits, *probs, *pull, *first, *second;
  float* target;    // [touched] or, with dense rows, [anchors]
  float* relative;  // likewise: target / r - 1
  int32_t* mass;    // [2 * touched] fuse's target as integers
  float tail_logit;
  float target_outside;  // the target's mass on anchors no candidate names
};

template <bool kShared>
__device__ __forceinline__ SearchState<kShared> search_state(char* base, const SearchLayout& layout,
                                                             int32_t candidates) {
  const auto place = [&](auto*& array, uint32_t start) {
    array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(base + size_t(16) * start);
  };
  SearchState<kShared> row;
  row.candidates = row.index.candidates = candidates;
  place(row.ids, layout.ids);
  place(row.logits, layout.logits);
  place(row.probs, layout.probs);
  place(row.pull, layout.pull);
  place(row.first, layout.first);
  place(row.second, layout.second);
  place(row.target, layout.target);
  place(row.relative, layout.relative);
  place(row.mass, layout.target);
  row.tail_logit = row.target_outside = 0.0f;
  auto& index = row.index;
  index.pitch = layout.pitch;
  index.words = layout.words;
  index.bits_room = layout.bits_room;
  index.touched = layout.width;  // of dense rows; number_anchors counts those of sparse rows
  index.short_count = index.long_count = index.single = 0;
  place(index.lengths, layout.lengths);
  place(index.uniform, layout.uniform);
  place(index.numbers, layout.numbers);
  place(index.excess, layout.excess);
  place(index.columns, layout.target);
  place(index.named, layout.named);
  place(index.several, layout.several);
  place(index.before, layout.before);
  place(index.starts, layout.starts);
  place(index.group_candidates, layout.group_candidates);
  place(index.group_excess, layout.group_excess);
  place(index.short_anchors, layout.short_anchors);
  place(index.long_anchors, layout.long_anchors);
  place(index.bits, layout.relative);
  return row;
}

}  // namespace deepen
