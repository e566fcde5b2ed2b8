// What a fuzz target makes of libFuzzer's bytes: sizes, settings at their limits, numbers that break sums.
// After the last byte everything is 0.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>

#include "core/dtype.h"
#include "core/isa.h"

// A promise that was broken; libFuzzer keeps the input.
#define PROMISED(condition)                                                                 \
  do {                                                                                      \
    if (!(condition)) {                                                                     \
      std::fprintf(stderr, "PROMISE BROKEN: %s [%s:%d]\n", #condition, __FILE__, __LINE__); \
      std::abort();                                                                         \
    }                                                                                       \
  } while (0)

namespace fuzz {

// Calls of operations and of libdeepen's interface so far, written when the process ends well. Many inputs
// make several.
struct Calls {
  int64_t count = 0;
  ~Calls() { std::fprintf(stderr, "calls: %lld\n", (long long)count); }
};
inline Calls calls;

// Of its size exactly, so that AddressSanitizer sees the first byte beside it.
template <class T>
struct Buffer {
  int64_t count;
  std::unique_ptr<T[]> values;

  explicit Buffer(int64_t size) : count(size), values(new T[size_t(size)]()) {}
  T* data() { return values.get(); }
  T& operator[](int64_t at) { return values[size_t(at)]; }
  const T& operator[](int64_t at) const { return values[size_t(at)]; }
};

class Input {
 public:
  Input(const uint8_t* data, size_t size) : at_(data), end_(data + size) {}

  uint32_t byte() { return at_ < end_ ? *at_++ : 0; }
  // 0 to count - 1, for counts up to 256.
  int64_t below(int64_t count) { return int64_t(byte()) % count; }
  bool one_in(int64_t count) { return below(count) == count - 1; }
  uint32_t word() { return byte() | byte() << 8 | byte() << 16 | byte() << 24; }

  // A number that no size may be.
  int64_t no_size() {
    static const int64_t sizes[] = {0, -1, int64_t{1} << 31, int64_t{1} << 62, INT64_MAX, INT64_MIN};
    return sizes[below(6)];
  }

  float hostile() {
    using Limits = std::numeric_limits<float>;
    static const float numbers[] = {0.0f,
                                    -0.0f,
                                    1.0f,
                                    -1.0f,
                                    Limits::denorm_min(),
                                    1e-40f,
                                    Limits::min(),
                                    1e-30f,
                                    87.0f,
                                    -88.5f,
                                    65504.0f,
                                    1e10f,
                                    1e38f,
                                    -1e38f,
                                    Limits::max(),
                                    Limits::lowest(),
                                    Limits::infinity(),
                                    -Limits::infinity(),
                                    Limits::quiet_NaN()};
    return numbers[below(19)];
  }
  double hostile_double() {
    static const double numbers[] = {0, -1, 1e-320, 1e-50, 1e30, 1e300, INFINITY, NAN};
    return numbers[below(8)];
  }

  // Some logits: from a bulk of ordinary numbers to all that hostile() has. No byte is taken for most of
  // them.
  void logits(Buffer<float>* out) {
    const int64_t kind = below(8);
    uint32_t state = word() | 1;
    const float value = kind == 1 ? hostile() : 0.0f, step = kind == 3 ? 1e38f : kind == 4 ? 1e-40f : 3.0f;
    for (int64_t i = 0; i < out->count; ++i) {
      state = state * 1664525u + 1013904223u;
      const float uniform = float(state >> 8) / float(1 << 24) - 0.5f;
      (*out)[i] = kind == 1   ? value
                  : kind == 2 ? -INFINITY
                  : kind == 5 ? std::rint(2 * uniform)
                              : step * uniform;
    }
    const int64_t changed = kind == 6 ? 12 : below(4);
    for (int64_t i = 0; i < changed && out->count > 0; ++i)
      (*out)[int64_t(word() % uint64_t(out->count))] = hostile();
  }

  deepen::Dtype dtype() { return deepen::Dtype(below(3)); }

  // The instruction set of this call, of those that the machine has.
  void choose_isa() {
    const auto isa = deepen::Isa(below(3));
    deepen::set_isa(isa <= deepen::best_isa() ? isa : deepen::best_isa());
  }

 private:
  const uint8_t* at_;
  const uint8_t* end_;
};

inline int64_t size_of(deepen::Dtype dtype) { return dtype == deepen::Dtype::f32 ? 4 : 2; }

// The numbers in another dtype, and what they are after rounding to it.
inline Buffer<char> stored(Buffer<float>* values, deepen::Dtype dtype) {
  Buffer<char> bytes(values->count * size_of(dtype));
  for (int64_t i = 0; i < values->count; ++i) {
    float& value = (*values)[i];
    if (dtype == deepen::Dtype::f32) {
      std::memcpy(bytes.data() + 4 * i, &value, 4);
    } else if (dtype == deepen::Dtype::f16) {
      deepen::Half half;
      deepen::from_float(value, &half);
      std::memcpy(bytes.data() + 2 * i, &half, 2);
      value = deepen::to_float(half);
    } else {
      deepen::BFloat16 half;
      deepen::from_float(value, &half);
      std::memcpy(bytes.data() + 2 * i, &half, 2);
      value = deepen::to_float(half);
    }
  }
  return bytes;
}

// Whether each row of [batch, count] may be weights of `fuse`.
inline bool are_shares(const Buffer<float>& weights, int64_t batch, int64_t count) {
  for (int64_t row = 0; row < batch; ++row) {
    double sum = 0;
    for (int64_t i = 0; i < count; ++i) {
      const float weight = weights[row * count + i];
      if (!(weight >= 0 && weight < INFINITY)) return false;
      sum += double(weight);
    }
    if (std::fabs(sum - 1) > 1e-3) return false;
  }
  return true;
}

inline float loaded(const char* bytes, int64_t i, deepen::Dtype dtype) {
  if (dtype == deepen::Dtype::f32) {
    float value;
    std::memcpy(&value, bytes + 4 * i, 4);
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, bytes + 2 * i, 2);
  return dtype == deepen::Dtype::f16 ? deepen::to_float(deepen::Half{bits})
                                     : deepen::to_float(deepen::BFloat16{bits});
}

}  // namespace fuzz
