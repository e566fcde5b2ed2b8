// Selection on packed keys, compiled once for the baseline processor (see isa.h).
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace deepen {

// A value and its index in one integer: larger value first, ties to the lower index. -0 counts as +0.
static inline DEEPEN_HOST_DEVICE uint64_t pack_key(float value, uint32_t index) {
  uint32_t bits = float_to_bits(value + 0.0f);
  bits = (bits & 0x80000000u) ? ~bits : (bits | 0x80000000u);
  return (uint64_t(bits) << 32) | uint32_t(~index);
}
static inline DEEPEN_HOST_DEVICE uint32_t key_index(uint64_t key) { return ~uint32_t(key); }
static inline DEEPEN_HOST_DEVICE float key_value(uint64_t key) {
  const uint32_t bits = uint32_t(key >> 32);
  return bits_to_float((bits & 0x80000000u) ? (bits & 0x7fffffffu) : ~bits);
}

void keep_largest(uint64_t* keys, int64_t count, int64_t kept);  // the `kept` largest to the front, unordered
void sort_down(uint64_t* keys, int64_t count);

}  // namespace deepen
