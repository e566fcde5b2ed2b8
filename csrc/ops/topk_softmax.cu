// topk_softmax on CUDA. Bytes: the logits once (1 MB a row of 262,144 in f32, 0.3 us of an H100's memory),
// plus some 2 k candidate keys of 8 bytes a slice written and partly read back. Operations: one exponential
// and two comparisons a logit. All members' rows go into the same two launches, unless their dtypes differ:
// then each dtype has its own topk_slices.
//
//   topk_slices  blocks of 512 threads, two to a multiprocessor. A block streams its slice of a row with
//                16-byte loads, two a thread at a time, the next ones already under way. Each thread keeps a
//                running maximum and sum of exponentials; keys that reach the bar go into a list in shared
//                memory. The bar comes from the threads' maxima: k of them reach it, and some 2 k keys do. It
//                is found anew after 1, 2, 4, 8, ... rounds. The list that is handed on has the keys that
//                reach the last bar, in no order. Only a list that has no room left, as where logits are
//                alike or rise, is cut to its k largest.
//   topk_merge   one block a row. The slices hand on the largest of their threads' maxima too: some 1,000
//                samples, of which the k-th largest is a bar that at least k keys reach, and seldom many
//                more. Those are read from the lists' heads, and sorted by counting the larger ones.
//
// With one split the first kernel writes the result itself. For k above kListEntries: topk_softmax_sort.cuh.
#include "core/check.h"
#include "ops/topk_softmax.h"
#include "ops/topk_softmax_lists.cuh"
#include "ops/topk_softmax_merge.cuh"
#include "ops/topk_softmax_plan.cuh"
#include "ops/topk_softmax_sort.cuh"
#include "ops/topk_softmax_words.cuh"

namespace deepen {
namespace {

constexpr int kListEntries = 1024;  // the largest k whose lists stay in shared memory
int64_t chunk_of(Dtype dtype) { return kVectorsOfBlock * (dtype == Dtype::f32 ? 4 : 8); }

int64_t split_limit(const TopkSoftmaxParams& params) {
  const int64_t chunk = chunk_of(params.dtype);
  return std::min<int64_t>((params.vocab + chunk - 1) / chunk, kMaxSplits);
}

void lay_out(Arena& arena, MemberPlan& member) {
  const int64_t batch = member.params.batch, vocab = member.params.vocab, k = member.params.k;
  const bool lists = k <= kListEntries;
  // Of a batch on any device: there are at most kMaxBlocks slices, or one a row.
  const int64_t slices = std::min(batch * split_limit(member.params), std::max<int64_t>(batch, kMaxBlocks));
  member.facts = take<SliceFacts>(arena, lists ? slices : 0);
  member.samples = take<uint32_t>(arena, lists ? std::min(slices * kSelectThreads, batch * kMaxSamples) : 0);
  member.candidates = take<uint64_t>(arena, lists ? slices * list_room(k) : 0);
  member.stats = take<RowStats>(arena, lists ? 0 : batch * kMaxSplits);
  member.rows = take<uint64_t>(arena, lists ? 0 : batch * padded(vocab));
}

int list_capacity(int64_t k) { return int(4 * k) + 1024; }
size_t list_bytes(int64_t k) {
  return sizeof(ListScratch) + size_t(list_capacity(k) + 2 + list_room(k) + 2) * sizeof(uint64_t);
}

// What a thread knows after its slice; the list is in shared memory.
struct Streamed {
  RunningStats stats;
  uint64_t bar = 0;
  uint32_t ranked = 0;  // see find_bar
};

template <class T>
__device__ __forceinline__ Streamed stream(const MemberPlan& member, int64_t row, int split, uint64_t* list,
                                           uint64_t* spare, ListScratch* scratch) {
  constexpr int kLanes = 16 / sizeof(T), kKeys = kVectors * kLanes;
  const TopkSoftmaxParams& params = member.params;
  const int splits = member.splits, capacity = member.capacity, k = int(params.k), vocab = int(params.vocab);
  const int thread = int(threadIdx.x);

  const T* const logits = static_cast<const T*>(params.logits) + row * params.vocab;
  const int misaligned = int(reinterpret_cast<uintptr_t>(logits) % 16 / sizeof(T));
  const int head = min(misaligned == 0 ? 0 : kLanes - misaligned, vocab);
  const int vectors = (vocab - head) / kLanes;
  const int begin = int(int64_t(vectors) * split / splits),
            end = int(int64_t(vectors) * (split + 1) / splits);
  const uint4* const whole = reinterpret_cast<const uint4*>(logits + head);

  uint4 next[kVectors] = {};
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int at = begin + v * kSelectThreads + thread;
    if (at < end) next[v] = whole[at];
  }
  Streamed found;
  RunningStats& stats = found.stats;
  uint64_t& bar = found.bar;
  bool seen = begin + thread < end;
  if (thread < 2) scratch->overflown[thread] = 0;
  if (thread == 0) scratch->heads = scratch->tails = scratch->kept = 0;
  if (thread == 0) scratch->count = 0;
  __syncthreads();
  const int loose = split == 0 ? vocab - vectors * kLanes : 0;  // what lies before and after the vectors
  if (thread < loose) {
    const int at = thread < head ? thread : vectors * kLanes + thread;
    const float value = to_float(logits[at]);
    stats.add(value);
    seen = true;
    list[atomicAdd(&scratch->count, 1u)] = pack_key(value, uint32_t(at));
  }

  // This thread's largest; none if there is a NaN, whose key may be below all others.
  const auto best = [&] { return seen && stats.sum == stats.sum ? value_bits(stats.largest) : 0u; };
  const int samples = samples_of_warp(splits);
  int chunks = 0, round = 0;
  for (int base = begin; base < end; base += kVectorsOfBlock) {
    uint32_t words[kWords], chosen = 0;  // those that there are, then those that reach the bar
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int at = base + v * kSelectThreads + thread, later = at + kVectorsOfBlock;
      const bool exists = at < end;
      words[4 * v] = exists ? next[v].x : nothing(T());
      words[4 * v + 1] = exists ? next[v].y : nothing(T());
      words[4 * v + 2] = exists ? next[v].z : nothing(T());
      words[4 * v + 3] = exists ? next[v].w : nothing(T());
      if (exists) chosen |= ((1u << kLanes) - 1u) << v * kLanes;
      if (later < end) next[v] = whole[later];
    }

    float largest = -INFINITY;
#pragma unroll
    for (int i = 0; i < kKeys; ++i) largest = fmaxf(largest, logit(words, i, T()));
    stats.raise(largest);
#pragma unroll
    for (int i = 0; i < kKeys; ++i) stats.sum += __expf(logit(words, i, T()) - stats.base());

    ++chunks;
    if ((chunks & (chunks - 1)) == 0) found.ranked = find_bar(best(), k, samples, bar, scratch);

    const auto index = [&](int i) {
      return uint32_t(head + (base + i / kLanes * kSelectThreads + thread) * kLanes + i % kLanes);
    };
    const auto key = [&](int i) { return pack_key(logit(words, i, T()), index(i)); };
    const float bar_value = key_value(bar);  // NaN, which nothing is below, while there is no bar
    const uint32_t bar_index = key_index(bar);
    if (largest < bar_value) {
      chosen = 0;
    } else {
#pragma unroll
      for (int i = 0; i < kKeys; ++i) {
        const float value = logit(words, i, T());
        const bool below = value < bar_value || (value == bar_value && index(i) > bar_index);
        if (below) chosen &= ~(1u << i);
      }
    }
    const uint32_t left_out = append<kKeys>(chosen, key, list, capacity, &scratch->count);
    const auto again = [&](int i) { return pack_key(to_float(logits[index(i)]), index(i)); };
    bar = make_room(left_out, again, bar, round, list, capacity, spare, k, scratch);
  }
  if (chunks == 0 || (chunks & (chunks - 1)) != 0) found.ranked = find_bar(best(), k, samples, bar, scratch);

  return found;
}

template <class T>
__global__ void __launch_bounds__(kSelectThreads, 2) topk_slices(const Plan plan) {
  DEEPEN_SHARED(ListScratch, scratch);
  const MemberPlan& member = plan.members[blockIdx.y];
  if (blockIdx.x >= member.params.batch * member.splits) return;
  uint64_t* const list = reinterpret_cast<uint64_t*>(scratch + 1);
  uint64_t* const spare = list + member.capacity + 2;
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, splits = member.splits;
  const int64_t block = blockIdx.x, row = block / splits;
  const int split = int(block % splits);
  const Streamed found = stream<T>(member, row, split, list, spare, scratch);

  const RowStats own = combine_warp({found.stats.largest, found.stats.sum});
  if (lane == 0) scratch->warp_stats[warp] = own;
  const bool alone = splits == 1;
  const int k = int(member.params.k), room = list_room(k), samples = samples_of_warp(splits);
  const uint32_t head_bar = alone ? 0 : smallest(scratch->warp_lowest);
  uint64_t* const out = alone ? spare : member.candidates + block * room;
  hand_on(list, int(scratch->count), found.bar, lowest_key(head_bar), out, room, spare, k, scratch);
  if (warp == 0) {
    const RowStats part = lane < kSliceWarps ? scratch->warp_stats[lane] : RowStats{-INFINITY, 0.0f};
    const RowStats whole = combine_warp(part);
    if (lane == 0) scratch->stats = whole;
  }
  if (alone) return finish_row(member.params, row, spare, int(scratch->heads), list, scratch);
  const int rank = int(found.ranked % 32);
  if (rank < samples) {
    member.samples[(block * kSliceWarps + warp) * samples + rank] = found.ranked - uint32_t(rank);
  }
  if (threadIdx.x == 0) member.facts[block] = {scratch->stats, head_bar, scratch->heads, scratch->tails};
}

template <class T>
void launch_sorted(const MemberPlan& member, const Backend& backend) {
  const TopkSoftmaxParams& params = member.params;
  const int64_t size = padded(params.vocab), pairs = params.batch * size / 2;
  const int64_t most = 4 * multiprocessors(backend.device);
  const unsigned rows = unsigned(params.batch), splits = unsigned(member.splits);
  const unsigned grid = unsigned(std::min<int64_t>((pairs + kSelectThreads - 1) / kSelectThreads, most));
  const size_t bytes = sizeof(SelectScratch);
  DEEPEN_LAUNCH((topk_keys<T>), rows * splits, kSelectThreads, bytes, backend.stream, params, member.stats,
                member.rows, member.splits, size);
  const unsigned blocks = unsigned(params.batch * (size / kNear));
  DEEPEN_LAUNCH(sort_near, blocks, kSelectThreads, 0, backend.stream, member.rows, size, 2, kNear);
  for (int64_t run = 2 * kNear; run <= size; run *= 2) {
    for (int64_t distance = run / 2; distance >= kNear; distance /= 2) {
      DEEPEN_LAUNCH(sort_step, grid, kSelectThreads, 0, backend.stream, member.rows, pairs, size, run,
                    distance);
    }
    DEEPEN_LAUNCH(sort_near, blocks, kSelectThreads, 0, backend.stream, member.rows, size, run, run);
  }
  DEEPEN_LAUNCH(write_sorted, rows, kSelectThreads, bytes, backend.stream, params, member.stats, member.rows,
                member.splits, size);
}

void launch_sorted(const MemberPlan& member, const Backend& backend) {
  switch (member.params.dtype) {
    case Dtype::f32: return launch_sorted<float>(member, backend);
    case Dtype::f16: return launch_sorted<Half>(member, backend);
    case Dtype::bf16: return launch_sorted<BFloat16>(member, backend);
  }
}

double bytes_of(const TopkSoftmaxParams& params) {
  return double(params.vocab) * (params.dtype == Dtype::f32 ? 4 : 2);
}

// Members share the blocks that are resident at once by the bytes they read.
void split_rows(MemberPlan* members, int count, int blocks) {
  double bytes = 0;
  for (int i = 0; i < count; ++i) bytes += double(members[i].params.batch) * bytes_of(members[i].params);
  for (int i = 0; i < count; ++i) {
    const TopkSoftmaxParams& params = members[i].params;
    const int64_t share = int64_t(blocks * bytes_of(params) / bytes);
    members[i].splits = int(std::min(std::max<int64_t>(share, 1), split_limit(params)));
  }
}

// Some members of one call, and how many blocks the one with the most has.
struct Launch {
  Plan plan{};
  unsigned count = 0;
  int64_t slices = 0, merges = 0;
  size_t shared_bytes = 0;

  void add(const MemberPlan& member) {
    const int64_t batch = member.params.batch;
    slices = std::max(slices, batch * member.splits);
    merges = std::max(merges, member.splits > 1 ? batch : 0);
    shared_bytes = std::max(shared_bytes, list_bytes(member.params.k));
    plan.members[count++] = member;
  }
};

template <class T>
void launch_slices(const Launch& all, Dtype dtype, const Backend& backend) {
  Launch some;
  for (unsigned i = 0; i < all.count; ++i) {
    if (all.plan.members[i].params.dtype == dtype) some.add(all.plan.members[i]);
  }
  if (some.count == 0) return;
  DEEPEN_LAUNCH((topk_slices<T>), dim3(unsigned(some.slices), some.count), kSelectThreads, some.shared_bytes,
                backend.stream, some.plan);
}

// At most kMembersAtOnce.
void launch(MemberPlan* members, int count, const Backend& backend) {
  split_rows(members, count, std::min(2 * multiprocessors(backend.device), kMaxBlocks));
  Launch all;
  for (int i = 0; i < count; ++i) {
    const int64_t k = members[i].params.k, most = max_shared_bytes(backend.device);
    if (k > kListEntries) {
      launch_sorted(members[i], backend);
      continue;
    }
    DEEPEN_CHECK(list_bytes(k) <= size_t(most), "k is ", k, ": its lists take ", list_bytes(k),
                 " bytes of shared memory, device ", backend.device, " has ", most);
    members[i].capacity = list_capacity(k);
    all.add(members[i]);
  }
  launch_slices<float>(all, Dtype::f32, backend);
  launch_slices<Half>(all, Dtype::f16, backend);
  launch_slices<BFloat16>(all, Dtype::bf16, backend);
  if (all.merges == 0) return;
  DEEPEN_LAUNCH(topk_merge, dim3(unsigned(all.merges), all.count), kSelectThreads, all.shared_bytes,
                backend.stream, all.plan);
}

}  // namespace

size_t topk_softmax_cuda_workspace(const TopkSoftmaxParams* members, int64_t count) {
  Arena arena{nullptr};
  for (int64_t i = 0; i < count; ++i) {
    MemberPlan member{};
    member.params = members[i];
    lay_out(arena, member);
  }
  return arena.used;
}

void topk_softmax_cuda(const TopkSoftmaxParams* members, int64_t count, void* workspace,
                       const Backend& backend) {
  const DeviceGuard guard(backend.device);
  Arena arena{static_cast<char*>(workspace)};
  MemberPlan some[kMembersAtOnce] = {};
  int held = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t batch = members[i].batch;
    if (batch == 0) continue;
    DEEPEN_CHECK(batch <= INT32_MAX / kMaxSplits, "the batch has ", batch,
                 " rows; a CUDA launch takes up to ", INT32_MAX / kMaxSplits);
    some[held].params = members[i];
    lay_out(arena, some[held++]);
    if (held == kMembersAtOnce) {
      launch(some, held, backend);
      held = 0;
    }
  }
  if (held > 0) launch(some, held, backend);
}

}  // namespace deepen
