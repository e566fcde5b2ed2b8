// Which blocks of the launches of topk_softmax.cu work on which member's rows, and what they leave in the
// workspace for each other.
#pragma once

#include <algorithm>

#include "core/arena.h"
#include "ops/topk_softmax_rows.cuh"

namespace deepen {
namespace {

constexpr int kMembersAtOnce = 16;  // of a launch; its arguments have 4 KB
constexpr int kMaxBlocks = 512;     // of topk_slices, unless there are more rows
constexpr int kSliceWarps = kSelectThreads / 32;
constexpr int kMaxSamples = 1024;  // of a row

// What a slice says of itself beside its keys.
struct SliceFacts {
  RowStats stats;
  uint32_t head_bar;  // value bits: the keys that reach it are the list's head, at its front
  uint32_t heads;
  uint32_t tails;  // the other keys, from its end backwards
};

// One member's part of the launches. A slice's samples are the largest logits of some of its threads, as
// value bits; 0 is none.
struct MemberPlan {
  TopkSoftmaxParams params;
  SliceFacts* facts;     // [batch, splits]
  uint32_t* samples;     // [batch, splits, kSliceWarps * samples_of_warp(splits)]
  uint64_t* candidates;  // [batch, splits, list_room(k)]
  RowStats* stats;       // [batch, kMaxSplits], as rows for k above kListEntries
  uint64_t* rows;        // [batch, padded(vocab)]
  int splits;            // blocks of topk_slices to a row
  int capacity;          // keys that a block's own list holds
};

// The members of a launch: blockIdx.y is one of them. blockIdx.x counts its blocks; those past its last one
// have nothing to do.
struct Plan {
  MemberPlan members[kMembersAtOnce];
};

DEEPEN_HOST_DEVICE inline int samples_of_warp(int splits) {
  const int share = kMaxSamples / kSliceWarps / splits;
  return share < 32 ? share : 32;
}

// How many keys a slice hands on at most. Some 2 k reach its bar.
DEEPEN_HOST_DEVICE inline int list_room(int64_t k) { return int(4 * k) + 128; }

}  // namespace
}  // namespace deepen
