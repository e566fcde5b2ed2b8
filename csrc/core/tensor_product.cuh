// A warp's product of small matrices on the tensor cores, as exact as float32: c[16, 8] += a[16, 8] b[8, 8]
// with each float32 operand split into two tf32 parts (11 significant bits each); the product of the two
// small parts is below float32's rounding and left out. Under emulation the emulator multiplies the same
// fragments.
//
// Fragments (PTX ISA, mma.m16n8k8 for .tf32): with lane = 4 g + t, a lane holds
//   a: [g][t], [g + 8][t], [g][t + 4], [g + 8][t + 4]    b: [t][g], [t + 4][g]
//   c: [g][2t], [g][2t + 1], [g + 8][2t], [g + 8][2t + 1]
#pragma once

#include <cstdint>

#include "core/block_reduce.cuh"
#include "core/dtype.h"

namespace deepen {

// The leading 11 bits of a float, rounded, and the leading 11 bits of what is left, rounded (Veltkamp's way,
// which keeps NaN). A NaN or infinity leaves NaN in the second part.
struct SplitFloat {
  uint32_t big, small;
};

__device__ __forceinline__ SplitFloat split_float(float value) {
  const uint32_t big = (float_to_bits(value) + 0x1000u) & 0xffffe000u;
  const float left = value - bits_to_float(big);
  const float scaled = __fmul_rn(left, 8193.0f);  // 2^13 + 1; never fused with what follows
  return {big, float_to_bits(scaled - (scaled - left))};
}

// c += a b, operands in tf32.
__device__ __forceinline__ void multiply_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifndef DEEPEN_EMULATE
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  emulator::multiply_tf32(c, a, b);
#endif
}

}  // namespace deepen
