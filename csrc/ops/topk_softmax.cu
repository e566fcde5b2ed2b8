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
#include <algorithm>

#include "core/arena.h"
#include "core/check.h"
#include "ops/topk_softmax.h"
#include "ops/topk_softmax_rows.cuh"
#include "ops/topk_softmax_sort.cuh"

namespace deepen {
namespace {

constexpr int kListEntries = 1024;  // the largest k whose lists stay in shared memory
constexpr int kPerThread = 8;       // logits a thread handles between two looks at the list
constexpr int kChunk = kSelectThreads * kPerThread;
constexpr int kLoose = 16;  // room for logits outside the 16-byte vectors of an unaligned row
constexpr int kMergeKeys = kMaxSplits / (kSelectThreads / 32);  // of a thread at a time, in topk_merge
static_assert(kMergeKeys * kSelectThreads <= kChunk, "a round of topk_merge fits where a chunk does");

struct Layout {
  RowStats* stats;       // [batch, kMaxSplits]
  uint64_t* candidates;  // [batch, splits up to split_limit(vocab), k], each split's sorted, padded with 0
  uint64_t* rows;        // [batch, padded(vocab)], for k above kListEntries
};

int64_t split_limit(int64_t vocab) { return std::min<int64_t>((vocab + kChunk - 1) / kChunk, kMaxSplits); }

Layout lay_out(Arena& arena, int64_t batch, int64_t vocab, int64_t k) {
  const bool lists = k <= kListEntries;
  Layout layout{};
  layout.stats = take<RowStats>(arena, batch * kMaxSplits);
  layout.candidates = take<uint64_t>(arena, lists ? batch * split_limit(vocab) * k : 0);
  layout.rows = take<uint64_t>(arena, lists ? 0 : batch * padded(vocab));
  return layout;
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
__global__ void __launch_bounds__(kSelectThreads, 2)
    topk_slices(TopkSoftmaxParams params, Layout layout, int splits, int capacity) {
  constexpr int kLanes = 16 / sizeof(T), kVectors = kPerThread / kLanes;
  DEEPEN_SHARED(SelectScratch, scratch);
  uint64_t* const list = reinterpret_cast<uint64_t*>(scratch + 1);
  uint64_t* const spare = list + capacity;
  const int thread = int(threadIdx.x), k = int(params.k);
  const int64_t row = blockIdx.x / unsigned(splits);
  const int split = int(blockIdx.x % unsigned(splits));

  const T* const logits = static_cast<const T*>(params.logits) + row * params.vocab;
  const int64_t misaligned = int64_t(reinterpret_cast<uintptr_t>(logits) % 16) / int64_t(sizeof(T));
  int64_t head = misaligned == 0 ? 0 : kLanes - misaligned;
  if (head > params.vocab) head = params.vocab;
  const int64_t vectors = (params.vocab - head) / kLanes;
  const int64_t begin = vectors * split / splits, end = vectors * (split + 1) / splits;
  const uint4* const whole = reinterpret_cast<const uint4*>(logits + head);

  RunningStats stats;
  uint64_t bar = 0;
  if (thread == 0) scratch->count = 0;
  __syncthreads();
  if (split == 0) {  // what lies before and after the vectors
    const int64_t loose = params.vocab - vectors * kLanes;
    if (thread < loose) {
      const int64_t at = thread < head ? thread : vectors * kLanes + thread;
      const float value = to_float(logits[at]);
      stats.add(value);
      list[atomicAdd(&scratch->count, 1u)] = pack_key(value, uint32_t(at));
    }
  }

  uint4 next[kVectors] = {};
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int64_t at = begin + v * kSelectThreads + thread;
    if (at < end) next[v] = whole[at];
  }
  for (int64_t base = begin; base < end; base += kSelectThreads * kVectors) {
    float values[kPerThread];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = base + v * kSelectThreads + thread;
      unpack(next[v], values + v * kLanes, T());
      if (at >= end) {
#pragma unroll
        for (int i = 0; i < kLanes; ++i) values[v * kLanes + i] = -INFINITY;
      }
      const int64_t later = at + kSelectThreads * kVectors;
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
  uint64_t* const out = layout.candidates + (row * splits + split) * params.k;
  for (int i = thread; i < k; i += kSelectThreads) out[i] = i < count ? spare[i] : 0;
  if (thread == 0) layout.stats[row * kMaxSplits + split] = whole_slice;
}

__global__ void __launch_bounds__(kSelectThreads)
    topk_merge(TopkSoftmaxParams params, Layout layout, int splits, int capacity) {
  DEEPEN_SHARED(SelectScratch, scratch);
  uint64_t* const list = reinterpret_cast<uint64_t*>(scratch + 1);
  uint64_t* const spare = list + capacity;
  const int thread = int(threadIdx.x), lane = thread % 32, warp = thread / 32, k = int(params.k);
  const int64_t row = blockIdx.x;
  const uint64_t* const candidates = layout.candidates + row * splits * params.k;

  const RowStats stats = merge_stats(layout.stats + row * kMaxSplits, splits, scratch);
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
void launch_sorted(const TopkSoftmaxParams& params, RowStats* stats, uint64_t* keys, int splits, int blocks,
                   void* stream) {
  const int64_t size = padded(params.vocab), pairs = params.batch * size / 2;
  const unsigned rows = unsigned(params.batch);
  const unsigned grid = unsigned(std::min<int64_t>((pairs + kSelectThreads - 1) / kSelectThreads, blocks));
  const size_t bytes = sizeof(SelectScratch);
  DEEPEN_LAUNCH((topk_keys<T>), rows * splits, kSelectThreads, bytes, stream, params, stats, keys, splits,
                size);
  for (int64_t run = 2; run <= size; run *= 2) {
    for (int64_t distance = run / 2; distance > 0; distance /= 2) {
      DEEPEN_LAUNCH(sort_step, grid, kSelectThreads, 0, stream, keys, pairs, size, run, distance);
    }
  }
  DEEPEN_LAUNCH(write_sorted, rows, kSelectThreads, bytes, stream, params, stats, keys, splits, size);
}

template <class T>
void launch(const TopkSoftmaxParams& params, const Backend& backend) {
  const int64_t batch = params.batch, vocab = params.vocab, k = params.k;
  const int blocks = 2 * multiprocessors(backend.device);  // resident at once
  const int splits = int(std::min(std::max<int64_t>(blocks / batch, 1), split_limit(vocab)));
  Arena arena{static_cast<char*>(params.workspace)};
  const Layout layout = lay_out(arena, batch, vocab, k);
  if (k > kListEntries) {
    return launch_sorted<T>(params, layout.stats, layout.rows, splits, 2 * blocks, backend.stream);
  }
  const int capacity = list_capacity(k), most = max_shared_bytes(backend.device);
  const size_t bytes = list_bytes(k);
  DEEPEN_CHECK(bytes <= size_t(most), "k is ", k, ": its lists take ", bytes,
               " bytes of shared memory, device ", backend.device, " has ", most);
  DEEPEN_LAUNCH((topk_slices<T>), unsigned(batch * splits), kSelectThreads, bytes, backend.stream, params,
                layout, splits, capacity);
  if (splits == 1) return;
  DEEPEN_LAUNCH(topk_merge, unsigned(batch), kSelectThreads, bytes, backend.stream, params, layout, splits,
                capacity);
}

}  // namespace

size_t topk_softmax_cuda_workspace(int64_t batch, int64_t vocab, int64_t k) {
  Arena arena{nullptr};
  lay_out(arena, batch, vocab, k);
  return arena.used;
}

void topk_softmax_cuda(const TopkSoftmaxParams& params, const Backend& backend) {
  DEEPEN_CHECK(params.batch <= INT32_MAX / kMaxSplits, "the batch has ", params.batch,
               " rows; a CUDA launch takes up to ", INT32_MAX / kMaxSplits);
  const DeviceGuard guard(backend.device);
  switch (params.dtype) {
    case Dtype::f32: return launch<float>(params, backend);
    case Dtype::f16: return launch<Half>(params, backend);
    case Dtype::bf16: return launch<BFloat16>(params, backend);
  }
}

}  // namespace deepen
