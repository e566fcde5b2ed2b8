// Logits as topk_slices loads them: vectors of 16 bytes, of any dtype, kept as words until a float is needed.
#pragma once

#include "core/block_select.cuh"
#include "core/dtype.h"

namespace deepen {
namespace {

constexpr int kVectors = 2;  // of 16 bytes, that a thread handles between two looks at the list
constexpr int kVectorsOfBlock = kVectors * kSelectThreads;
constexpr int kWords = 4 * kVectors;  // of 4 bytes

// to_float in one instruction.
#ifdef DEEPEN_EMULATE
__device__ __forceinline__ float widen(Half value) { return to_float(value); }
#else
__device__ __forceinline__ float widen(Half value) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
}
#endif
__device__ __forceinline__ float widen(BFloat16 value) { return to_float(value); }

// Logit i of those in the words; words of -inf.
__device__ __forceinline__ float logit(const uint32_t* words, int i, float) {
  return bits_to_float(words[i]);
}
template <class T>
__device__ __forceinline__ float logit(const uint32_t* words, int i, T) {
  return widen(T{uint16_t(words[i / 2] >> (i % 2 * 16))});
}
__device__ __forceinline__ uint32_t nothing(float) { return 0xff800000u; }
__device__ __forceinline__ uint32_t nothing(Half) { return 0xfc00fc00u; }
__device__ __forceinline__ uint32_t nothing(BFloat16) { return 0xff80ff80u; }

}  // namespace
}  // namespace deepen
