// The largest keys (select.h) of a stream, kept by one warp in shared memory: keys above the bar are appended
// through a ballot, and a full list is cut to the largest, which raises the bar. Keys are distinct, because
// each holds its index, so what is kept does not depend on the order in which they come. Key 0 is below every
// real key and stands for none.
#pragma once

#include <cstdint>

#include "core/block_reduce.cuh"
#include "core/select.h"

namespace deepen {

struct Larger64 {
  __device__ __forceinline__ uint64_t operator()(uint64_t a, uint64_t b) const { return a < b ? b : a; }
};

// How many keys a list holds that is to end as the `kept` largest.
static DEEPEN_HOST_DEVICE inline int list_capacity(int64_t kept) { return int(kept) + 32; }

// What a list is between two tiles, in shared memory.
struct ListHead {
  uint64_t bar;
  int count;
};

// All 32 lanes call every function, and hold the same values.
struct WarpList {
  uint64_t* keys;  // [list_capacity(kept)]
  int kept;
  uint64_t bar = 0;  // at least `kept` keys have reached it, unless it is 0
  int count = 0;

  __device__ __forceinline__ void load(const ListHead& head) {
    bar = head.bar;
    count = head.count;
    __syncwarp();
  }
  __device__ __forceinline__ void store(ListHead& head) const {
    if (threadIdx.x % 32 == 0) head = {bar, count};
    __syncwarp();
  }

  // A key from each lane, 0 for none. Whether any was above the bar.
  __device__ __forceinline__ bool offer(uint64_t key) {
    unsigned above = __ballot_sync(kWholeWarp, key > bar);
    if (above == 0) return false;
    if (count + __popc(above) > kept + 32) {
      cut();
      above = __ballot_sync(kWholeWarp, key > bar);
    }
    if (key > bar) keys[count + place(above)] = key;
    count += __popc(above);
    return true;
  }

  // write(rank, key) for each of the `kept` largest, rank 0 the largest; fewer where fewer came.
  template <class Write>
  __device__ __forceinline__ void ranked(Write write) const {
    __syncwarp();
    for (int at = int(threadIdx.x) % 32; at < count; at += 32) {
      const int rank = larger_than(keys[at]);
      if (rank < kept) write(rank, keys[at]);
    }
    __syncwarp();
  }

 private:
  // Of the lanes in this set, how many come before this one.
  static __device__ __forceinline__ int place(unsigned lanes) {
    return __popc(lanes & ((1u << threadIdx.x % 32) - 1u));
  }

  __device__ __forceinline__ int larger_than(uint64_t key) const {
    int larger = 0;
    for (int i = 0; i < count; ++i) larger += keys[i] > key;
    return larger;
  }

  // Leaves the `kept` largest. More than these are in the list.
  __device__ void cut() {
    uint64_t last = 0;
    ranked([&](int rank, uint64_t key) { last = rank == kept - 1 ? key : last; });
    bar = warp_reduce(last, Larger64());
    int left = 0;
    for (int base = 0; base < count; base += 32) {
      const int at = base + int(threadIdx.x) % 32;
      const uint64_t key = at < count ? keys[at] : 0;
      const unsigned stays = __ballot_sync(kWholeWarp, key >= bar);
      __syncwarp();
      if (key >= bar) keys[left + place(stays)] = key;  // never past those still to be read
      left += __popc(stays);
    }
    count = left;
  }
};

}  // namespace deepen
