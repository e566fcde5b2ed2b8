// Reductions over a warp and over a block. Every thread gets the same bits, and the same ones on every run:
// the tree depends on the number of threads alone. `op` must be commutative.
#pragma once

#include <cstdint>

#include "core/cuda.h"

namespace deepen {

constexpr unsigned kWholeWarp = 0xffffffffu;
constexpr int kMaxWarps = 32;  // of a block

struct Plus {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Larger {  // of numbers; a NaN is no number
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};
struct Smaller {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return b < a ? b : a;
  }
};
struct Either {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a | b;
  }
};

// All 32 lanes must call.
template <class T, class Op>
__device__ __forceinline__ T warp_reduce(T value, Op op) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    value = op(value, __shfl_xor_sync(kWholeWarp, value, distance));
  }
  return value;
}

// Of this lane's value and those of the lanes below it. All 32 lanes must call.
template <class T>
__device__ __forceinline__ T warp_inclusive_sum(T value) {
  const int lane = int(threadIdx.x) % 32;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const T below = __shfl_up_sync(kWholeWarp, value, distance);
    if (lane >= distance) value += below;
  }
  return value;
}

// All threads of the block must call, and there must be whole warps of them. `scratch` is kMaxWarps elements
// of shared memory, free again on return.
template <class T, class Op>
__device__ __forceinline__ T block_reduce(T value, T identity, Op op, T* scratch) {
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, warps = int(blockDim.x) / 32;
  value = warp_reduce(value, op);
  if (lane == 0) scratch[warp] = value;
  __syncthreads();
  value = warp_reduce(lane < warps ? scratch[lane] : identity, op);
  __syncthreads();
  return value;
}

}  // namespace deepen
