// Which blocks of a launch work on which member's rows, and where their scratch memory is.
#pragma once

#include <algorithm>

#include "core/arena.h"
#include "ops/topk_softmax_rows.cuh"

namespace deepen {
namespace {

constexpr int kMembersAtOnce = 16;  // of a launch; its arguments have 4 KB

// One member's part of the launches.
struct MemberPlan {
  TopkSoftmaxParams params;
  RowStats* stats;       // [batch, kMaxSplits]
  uint64_t* candidates;  // [batch, splits, k], each split's sorted, padded with 0
  uint64_t* rows;        // [batch, padded(vocab)], for k above kListEntries
  int splits;            // blocks of topk_slices to a row
  int capacity;          // keys that a block's list holds
  int first_slice;       // blocks of topk_slices before this member's
  int first_merge;       // and of topk_merge
};

struct Plan {
  MemberPlan members[kMembersAtOnce];
  int count = 0;
  int slices = 0, merges = 0;  // blocks
  size_t shared_bytes = 0;
};

// The member that a block works for: the last one that begins at or before it.
__device__ __forceinline__ int member_of(const Plan& plan, int MemberPlan::* first) {
  int member = plan.count - 1;
  while (member > 0 && plan.members[member].*first > int(blockIdx.x)) --member;
  return member;
}

}  // namespace
}  // namespace deepen
