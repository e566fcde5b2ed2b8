// Element types that cross the boundary, and their conversion to and from float.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/host_device.h"

namespace deepen {

enum class Dtype : int32_t { f32 = 0, f16 = 1, bf16 = 2 };

// IEEE binary16 and bfloat16 as raw bits: the core includes no framework and no compiler-specific half type.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

static inline DEEPEN_HOST_DEVICE float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
static inline DEEPEN_HOST_DEVICE uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

static inline DEEPEN_HOST_DEVICE float to_float(float value) { return value; }
static inline DEEPEN_HOST_DEVICE float to_float(BFloat16 value) {
  return bits_to_float(uint32_t(value.bits) << 16);
}
static inline DEEPEN_HOST_DEVICE float to_float(Half value) {
  const uint32_t sign = uint32_t(value.bits & 0x8000u) << 16;
  const uint32_t rest = uint32_t(value.bits & 0x7fffu) << 13;
  if (rest >= 0x0f800000u) return bits_to_float(sign | (rest + 0x70000000u));  // inf and NaN
  // Multiplying by 2^112 moves the exponent's bias and turns subnormals into normals, exactly.
  return bits_to_float(sign | float_to_bits(bits_to_float(rest) * bits_to_float(0x77800000u)));
}

// Rounds to nearest, ties to even.
static inline DEEPEN_HOST_DEVICE void from_float(float value, float* out) { *out = value; }
static inline DEEPEN_HOST_DEVICE void from_float(float value, BFloat16* out) {
  const uint32_t bits = float_to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    out->bits = uint16_t((bits >> 16) | 0x40u);
    return;
  }
  out->bits = uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
static inline DEEPEN_HOST_DEVICE void from_float(float value, Half* out) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    out->bits = uint16_t(sign | 0x7e00u);
  } else if (magnitude >= 0x477ff000u) {  // rounds to 65536 or more
    out->bits = uint16_t(sign | 0x7c00u);
  } else if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 lets the float adder do the rounding
    const float shifted = bits_to_float(magnitude) + 0.5f;
    out->bits = uint16_t(sign | (float_to_bits(shifted) - 0x3f000000u));
  } else {
    const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
    out->bits = uint16_t(sign | ((rounded - 0x38000000u) >> 13));
  }
}

}  // namespace deepen
