// Selection among packed keys (select.h) in shared memory, by one block of kSelectThreads threads. Keys are
// distinct, because each holds its index; so what is selected does not depend on the order they lie in, and
// lists may be filled through an atomic counter. Key 0 is below every real key and pads lists.
#pragma once

#include <cstdint>

#include "core/block_reduce.cuh"
#include "core/select.h"

namespace deepen {

constexpr int kSelectThreads = 512;
constexpr int kDigitBits = 11;
constexpr int kBins = 1 << kDigitBits;

struct SelectScratch {
  uint32_t bins[kBins];
  uint64_t words[kMaxWarps];
  uint32_t totals[kMaxWarps];
  float numbers[kMaxWarps];
  uint32_t bin, above, inside;  // the bin that holds the key in search, the keys in bins above it and in it
  uint32_t count;               // a list's length while it is filled
};

// Counting down from the highest bin: which bin holds the `wanted`-th key. In scratch, after a barrier.
static __device__ __forceinline__ void find_bin(uint32_t wanted, SelectScratch* scratch) {
  constexpr int kPerThread = kBins / kSelectThreads;
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int first = kBins - 1 - int(threadIdx.x) * kPerThread;
  // One load of 16 bytes: four of 4 would be strided.
  static_assert(kPerThread == 4, "a thread's bins are one uint4, the highest last");
  const uint4 bins = *reinterpret_cast<const uint4*>(scratch->bins + first - (kPerThread - 1));
  const uint32_t inside_of[kPerThread] = {bins.w, bins.z, bins.y, bins.x};
  const uint32_t own = bins.x + bins.y + bins.z + bins.w;
  uint32_t upto = warp_inclusive_sum(own);  // in this warp's bins down to this thread's, inclusive
  if (lane == 31) scratch->totals[warp] = upto;
  __syncthreads();
  for (int i = 0; i < warp; ++i) upto += scratch->totals[i];
  uint32_t above = upto - own;
  if (above < wanted && wanted <= upto) {  // one thread
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const uint32_t inside = inside_of[i];
      if (wanted <= above + inside) {
        scratch->bin = uint32_t(first - i);
        scratch->above = above;
        scratch->inside = inside;
        break;
      }
      above += inside;
    }
  }
  __syncthreads();
}

// A threshold that exactly `wanted` of the keys reach: radix select, kDigitBits at a time, from the first bit
// in which the keys differ, until a bin is wanted whole. 1 <= wanted <= count. If padding is among the
// `wanted` largest, it is 0. Ends in a barrier; the caller makes the keys visible before.
static __device__ uint64_t select_threshold(const uint64_t* keys, int count, int wanted,
                                            SelectScratch* scratch) {
  const uint64_t sample = keys[0];
  uint64_t differing = 0;
  for (int i = int(threadIdx.x); i < count; i += kSelectThreads) differing |= keys[i] ^ sample;
  differing = block_reduce(differing, uint64_t(0), Either(), scratch->words);
  if (differing == 0) return sample;

  int above_digit = 64;  // bits from here up are settled
  {
    const uint32_t high = uint32_t(differing >> 32);
    above_digit -= high != 0 ? __clz(int(high)) : 32 + __clz(int(uint32_t(differing)));
  }
  uint64_t prefix = above_digit == 64 ? 0 : sample >> above_digit;
  uint32_t left = uint32_t(wanted);
  for (;;) {
    const int shift = above_digit > kDigitBits ? above_digit - kDigitBits : 0;
    const uint32_t mask = (1u << (above_digit - shift)) - 1u;
    for (int i = int(threadIdx.x); i < kBins; i += kSelectThreads) scratch->bins[i] = 0;
    __syncthreads();
    for (int i = int(threadIdx.x); i < count; i += kSelectThreads) {
      const uint64_t key = keys[i];
      if (above_digit == 64 || key >> above_digit == prefix) {
        atomicAdd(&scratch->bins[uint32_t(key >> shift) & mask], 1u);
      }
    }
    __syncthreads();
    find_bin(left, scratch);
    left -= scratch->above;
    prefix = (prefix << (above_digit - shift)) | scratch->bin;
    if (scratch->inside == left || shift == 0) return prefix << shift;
    above_digit = shift;
  }
}

// Keeps the `wanted` largest of the keys; `spare` holds `wanted` keys. Begins and ends in a barrier. Returns
// the threshold that they reach; scratch->count is `wanted` then.
static __device__ uint64_t cut_to_largest(uint64_t* keys, int count, int wanted, uint64_t* spare,
                                          SelectScratch* scratch) {
  __syncthreads();
  const uint64_t threshold = select_threshold(keys, count, wanted, scratch);
  if (threadIdx.x == 0) scratch->count = 0;
  __syncthreads();
  for (int i = int(threadIdx.x); i < count; i += kSelectThreads) {
    if (keys[i] >= threshold) spare[atomicAdd(&scratch->count, 1u)] = keys[i];
  }
  __syncthreads();
  for (int i = int(threadIdx.x); i < wanted; i += kSelectThreads) keys[i] = spare[i];
  __syncthreads();
  return threshold;
}

// sorted = the `wanted` largest of the keys, largest first: each key goes to the place that the number of
// larger ones gives. Several lanes share a key's comparisons when keys are few. The keys are 16-byte aligned
// and have room for one more. Begins and ends in a barrier.
static __device__ void sort_by_rank(uint64_t* keys, int count, int wanted, uint64_t* sorted) {
  if (threadIdx.x == 0 && count % 2 != 0) keys[count] = 0;  // they are read in pairs
  __syncthreads();
  int lanes = 32;
  while (lanes > 1 && count * lanes > kSelectThreads) lanes /= 2;
  const int part = int(threadIdx.x) % lanes;
  for (int base = 0; base < count; base += kSelectThreads / lanes) {
    const int at = base + int(threadIdx.x) / lanes;
    const uint64_t key = at < count ? keys[at] : ~uint64_t(0);
    int rank = 0;
#pragma unroll 4
    for (int i = 2 * part; i < count; i += 2 * lanes) {
      const ulonglong2 pair = *reinterpret_cast<const ulonglong2*>(keys + i);
      rank += pair.x > key;
      rank += pair.y > key;
    }
    for (int distance = lanes / 2; distance > 0; distance /= 2) {
      rank += __shfl_xor_sync(kWholeWarp, rank, distance);
    }
    if (at < count && part == 0 && rank < wanted) sorted[rank] = key;
  }
  __syncthreads();
}

// A place of its own for each lane that wants one, counted in shared memory. All lanes of the warp call.
static __device__ __forceinline__ uint32_t claim(bool wanted, uint32_t* count) {
  const unsigned lanes = __ballot_sync(kWholeWarp, wanted);
  if (lanes == 0) return 0;
  const int lane = int(threadIdx.x) % 32, first = __ffs(int(lanes)) - 1;
  uint32_t at = 0;
  if (lane == first) at = atomicAdd(count, uint32_t(__popc(lanes)));
  return __shfl_sync(kWholeWarp, at, first) + uint32_t(__popc(lanes & ((1u << lane) - 1u)));
}

// Appends to a list those of each lane's kKeys keys whose bit in `chosen` is set; key(i) gives one. All lanes
// of the warp call. What the list has no room for is left out, though counted: its bits are returned.
template <int kKeys, class Key>
static __device__ __forceinline__ uint32_t append(uint32_t chosen, Key key, uint64_t* list, int capacity,
                                                  uint32_t* count) {
  if (!__any_sync(kWholeWarp, chosen != 0)) return 0;
  const int lane = int(threadIdx.x) % 32;
  const uint32_t own = uint32_t(__popc(chosen));
  uint32_t upto = own;  // in this lane and those before it
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const uint32_t before = __shfl_up_sync(kWholeWarp, upto, distance);
    if (lane >= distance) upto += before;
  }
  uint32_t at = 0;
  if (lane == 31) at = atomicAdd(count, upto);
  at = __shfl_sync(kWholeWarp, at, 31) + upto - own;
  uint32_t left_out = 0;
#pragma unroll
  for (int i = 0; i < kKeys; ++i) {
    if ((chosen >> i & 1u) == 0) continue;
    if (at < uint32_t(capacity)) {
      list[at] = key(i);
    } else {
      left_out |= 1u << i;
    }
    ++at;
  }
  return left_out;
}

}  // namespace deepen
