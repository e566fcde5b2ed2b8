// topk_softmax on CUDA. Bytes: the logits once (1 MB a row of 262,144 in f32, 0.3 us of an H100's memory),
// plus splits * k candidate keys of 8 bytes written and partly read back. Operations: one exponential and two
// comparisons a logit.
//
//   topk_slices  batch * splits blocks of 512 threads, two to a multiprocessor. A block streams its slice of
//                a row with 16-byte loads, 8 logits a thread at a time, the next ones already under way. Each
//                thread keeps a running maximum and sum of exponentials; keys that reach the bar go into a
//                list in shared memory. The first bar is the k-th largest of the threads' own largest;
//                whenever the list might overflow it is cut to its k largest, which raises the bar. The list
//                ends as the slice's k largest, sorted.
//   topk_merge   one block a row. Every split has ceil(k / splits) keys that are at least the smallest of the
//                splits' ceil(k / splits)-th keys, so that one is a bar which at least k keys reach, and on
//                real logits a few times k: most of the candidates are never read.
//
// With one split the first kernel writes the result itself. For k above kListEntries:
// topk_softmax_sort.cuh.
#include "core/check.h"
#include "ops/topk_softmax.h"
#include "ops/topk_softmax_plan.cuh"
#include "ops/topk_softmax_sort.cuh"

namespace deepen {
namespace {

constexpr int kListEntries = 1024;  // the largest k whose lists stay in shared memory
constexpr int kPerThread = 8;       // logits a thread handles between two looks at the list
constexpr int kChunk = kSelectThreads * kPerThread;
constexpr int kLoose = 16;  // room for logits outside the 16-byte vectors of an unaligned row
constexpr int kMergeKeys = kMaxSplits / (kSelectThreads / 32);  // of a thread at a time, in topk_merge
static_assert(kMergeKeys * kSelectThreads <= kChunk, "a round of topk_merge fits where a chunk does");

int64_t split_limit(int64_t vocab) { return std::min<int64_t>((vocab + kChunk - 1) / kChunk, kMaxSplits); }

void lay_out(Arena& arena, MemberPlan& member) {
  const int64_t batch = member.params.batch, vocab = member.params.vocab, k = member.params.k;
  const bool lists = k <= kListEntries;
  member.stats = take<RowStats>(arena, batch * kMaxSplits);
  member.candidates = take<uint64_t>(arena, lists ? batch * split_limit(vocab) * k : 0);
  member.rows = take<uint64_t>(arena, lists ? 0 : batch * padded(vocab));
}

int list_capacity(int64_t k) { return int(4 * k) + kChunk + kLoose; }
size_t list_bytes(int64_t k) {
  return sizeof(SelectScratch) + size_t(list_capacity(k) + k) * sizeof(uint64_t);
}

// One 16-byte vector of logits as floats.
__device__ __forceinline__ void unpack(const uint4& raw, float* values, float) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) values[i] = bits_to_float(words[i]);
}
template <class T>
__device__ __forceinline__ void unpack(const uint4& raw, float* values, T) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    values[2 * i] = to_float(T{uint16_t(words[i])});
    values[2 * i + 1] = to_float(T{uint16_t(words[i] >> 16)});
  }
}

template <class T>
__device__ __forceinline__ void slice(const MemberPlan& member, SelectScratch* scratch) {
  constexpr int kLanes = 16 / sizeof(T), kVectors = kPerThread / kLanes;
  const TopkSoftmaxParams params = member.params;
  const int splits = member.splits, capacity = member.capacity;
  uint64_t* const list = reinterpret_cast<uint64_t*>(scratch + 1);
  uint64_t* const spare = list + capacity;
  const int thread = int(threadIdx.x), k = int(params.k);
  const unsigned block = blockIdx.x - unsigned(member.first_slice);
  const int64_t row = block / unsigned(splits);
  const int split = int(block % unsigned(splits));

  const T* const logits = static_cast<const T*>(params.logits) + row * params.vocab;
  const int vocab = int(params.vocab);
  const int misaligned = int(reinterpret_cast<uintptr_t>(logits) % 16 / sizeof(T));
  const int head = min(misaligned == 0 ? 0 : kLanes - misaligned, vocab);
  const int vectors = (vocab - head) / kLanes;
  const int begin = int(int64_t(vectors) * split / splits),
            end = int(int64_t(vectors) * (split + 1) / splits);
  const uint4* const whole = reinterpret_cast<const uint4*>(logits + head);

  RunningStats stats;
  uint64_t bar = 0;
  if (thread == 0) scratch->count = 0;
  __syncthreads();
  if (split == 0) {  // what lies before and after the vectors
    const int loose = vocab - vectors * kLanes;
    if (thread < loose) {
      const int at = thread < head ? thread : vectors * kLanes + thread;
      const float value = to_float(logits[at]);
      stats.add(value);
      list[atomicAdd(&scratch->count, 1u)] = pack_key(value, uint32_t(at));
    }
  }

  uint4 next[kVectors] = {};
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int at = begin + v * kSelectThreads + thread;
    if (at < end) next[v] = whole[at];
  }
  for (int base = begin; base < end; base += kSelectThreads * kVectors) {
    float values[kPerThread];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int at = base + v * kSelectThreads + thread;
      unpack(next[v], values + v * kLanes, T());
      if (at >= end) {
#pragma unroll
        for (int i = 0; i < kLanes; ++i) values[v * kLanes + i] = -INFINITY;
      }
      const int later = at + kSelectThreads * kVectors;
      if (later < end) next[v] = whole[later];
    }

    float largest = values[0];
#pragma unroll
    for (int i = 1; i < kPerThread; ++i) largest = fmaxf(largest, values[i]);
    stats.raise(largest);
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) stats.sum += __expf(values[i] - stats.base());

    const auto index = [&](int i) {
      return uint32_t(head + (base + i / kLanes * kSelectThreads + thread) * kLanes + i % kLanes);
    };
    const auto exists = [&](int i) { return base + i / kLanes * kSelectThreads + thread < end; };
    if (base == begin) {
      uint64_t best = 0;
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        const uint64_t key = exists(i) ? pack_key(values[i], index(i)) : 0;
        best = key > best ? key : best;
      }
      if (k <= kSelectThreads) {
        uint64_t* const bests = list + capacity - kSelectThreads;
        bests[thread] = best;
        __syncthreads();
        bar = select_threshold(bests, kSelectThreads, k, scratch);
      }
    } else {
      __syncthreads();
      const int count = int(scratch->count);
      __syncthreads();
      if (count + kChunk > capacity) {
        bar = cut_to_largest(list, count, k, spare, scratch);
        if (thread == 0) scratch->count = uint32_t(k);
        __syncthreads();
      }
    }

    const float bar_value = key_value(bar);  // NaN, which nothing is below, while there is no bar
    if (!(largest < bar_value)) {
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        if (values[i] < bar_value || !exists(i)) continue;
        const uint64_t key = pack_key(values[i], index(i));
        if (key >= bar) list[atomicAdd(&scratch->count, 1u)] = key;
      }
    }
  }

  __syncthreads();
  int count = int(scratch->count);
  if (count > k) cut_to_largest(list, count, k, spare, scratch);
  count = count < k ? count : k;
  sort_by_rank(list, count, spare);
  const RowStats whole_slice = combine(stats.largest, stats.sum, scratch);
  if (splits == 1) return write_row(params, row, spare, whole_slice, scratch);
  uint64_t* const out = member.candidates + (row * splits + split) * params.k;
  for (int i = thread; i < k; i += kSelectThreads) out[i] = i < count ? spare[i] : 0;
  if (thread == 0) member.stats[row * kMaxSplits + split] = whole_slice;
}

__global__ void __launch_bounds__(kSelectThreads, 2) topk_slices(const Plan plan) {
  DEEPEN_SHARED(SelectScratch, scratch);
  const MemberPlan& member = plan.members[member_of(plan, &MemberPlan::first_slice)];
  switch (member.params.dtype) {
    case Dtype::f32: return slice<float>(member, scratch);
    case Dtype::f16: return slice<Half>(member, scratch);
    case Dtype::bf16: return slice<BFloat16>(member, scratch);
  }
}

__global__ void __launch_bounds__(kSelectThreads) topk_merge(const Plan plan) {
  DEEPEN_SHARED(SelectScratch, scratch);
  const MemberPlan& member = plan.members[member_of(plan, &MemberPlan::first_merge)];
  const TopkSoftmaxParams params = member.params;
  const int splits = member.splits, capacity = member.capacity;
  uint64_t* const list = reinterpret_cast<uint64_t*>(scratch + 1);
  uint64_t* const spare = list + capacity;
  const int thread = int(threadIdx.x), lane = thread % 32, warp = thread / 32, k = int(params.k);
  const int64_t row = int(blockIdx.x) - member.first_merge;
  const uint64_t* const candidates = member.candidates + row * splits * params.k;

  const RowStats stats = merge_stats(member.stats + row * kMaxSplits, splits, scratch);
  // The smallest of the splits' keys at this place. ~key turns it into a maximum; padding is no key.
  uint64_t bar = ~uint64_t(0);
  if (thread < splits) bar = candidates[thread * params.k + (k + splits - 1) / splits - 1];
  bar = block_reduce(bar, ~uint64_t(0), Smaller(), scratch->words);
  bar = bar == 0 ? 1 : bar;

  if (thread == 0) scratch->count = 0;
  __syncthreads();
  // Warp w looks at splits w, w + 16, ...: 32 candidates of each, until none has one that reaches the bar.
  for (int from = 0; from < k; from += 32) {
    uint64_t keys[kMergeKeys];
#pragma unroll
    for (int i = 0; i < kMergeKeys; ++i) {
      const int split = warp + i * (kSelectThreads / 32);
      keys[i] = split < splits && from + lane < k ? candidates[split * params.k + from + lane] : 0;
    }
    bool more = false;
#pragma unroll
    for (int i = 0; i < kMergeKeys; ++i) {
      if (keys[i] < bar) continue;
      list[atomicAdd(&scratch->count, 1u)] = keys[i];
      more = more || lane == 31;
    }
    // Two barriers inside: the count is whole for all, and stays until all have seen it.
    const uint32_t again = block_reduce(uint32_t(more), 0u, Either(), scratch->totals);
    const int count = int(scratch->count);
    if (again == 0) break;
    if (count + kMergeKeys * kSelectThreads > capacity) {
      bar = cut_to_largest(list, count, k, spare, scratch);
      if (thread == 0) scratch->count = uint32_t(k);
    }
    __syncthreads();
  }

  const int count = int(scratch->count);
  if (count > k) cut_to_largest(list, count, k, spare, scratch);
  sort_by_rank(list, k, spare);
  write_row(params, row, spare, stats, scratch);
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
  for (int64_t run = 2; run <= size; run *= 2) {
    for (int64_t distance = run / 2; distance > 0; distance /= 2) {
      DEEPEN_LAUNCH(sort_step, grid, kSelectThreads, 0, backend.stream, member.rows, pairs, size, run,
                    distance);
    }
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
    members[i].splits = int(std::min(std::max<int64_t>(share, 1), split_limit(params.vocab)));
  }
}

void append(Plan& plan, const MemberPlan& given, const Backend& backend) {
  MemberPlan& member = plan.members[plan.count++] = given;
  const int64_t k = member.params.k, most = max_shared_bytes(backend.device);
  const size_t bytes = list_bytes(k);
  DEEPEN_CHECK(bytes <= size_t(most), "k is ", k, ": its lists take ", bytes,
               " bytes of shared memory, device ", backend.device, " has ", most);
  plan.shared_bytes = std::max(plan.shared_bytes, bytes);
  member.capacity = list_capacity(k);
  member.first_slice = plan.slices;
  member.first_merge = plan.merges;
  plan.slices += int(member.params.batch) * member.splits;
  plan.merges += member.splits > 1 ? int(member.params.batch) : 0;
}

// At most kMembersAtOnce.
void launch(MemberPlan* members, int count, const Backend& backend) {
  split_rows(members, count, 2 * multiprocessors(backend.device));
  Plan plan;
  for (int i = 0; i < count; ++i) {
    if (members[i].params.k > kListEntries) {
      launch_sorted(members[i], backend);
    } else {
      append(plan, members[i], backend);
    }
  }
  if (plan.slices == 0) return;
  DEEPEN_LAUNCH(topk_slices, unsigned(plan.slices), kSelectThreads, plan.shared_bytes, backend.stream, plan);
  if (plan.merges == 0) return;
  DEEPEN_LAUNCH(topk_merge, unsigned(plan.merges), kSelectThreads, plan.shared_bytes, backend.stream, plan);
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
  int64_t rows = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (members[i].batch == 0) continue;
    rows += members[i].batch;
    DEEPEN_CHECK(rows <= INT32_MAX / kMaxSplits, "the batch has ", rows,
                 " rows or more; a CUDA launch takes up to ", INT32_MAX / kMaxSplits);
    some[held].params = members[i];
    lay_out(arena, some[held++]);
    if (held < kMembersAtOnce && i + 1 < count) continue;
    launch(some, held, backend);
    held = 0;
  }
  if (held > 0) launch(some, held, backend);
}

}  // namespace deepen
