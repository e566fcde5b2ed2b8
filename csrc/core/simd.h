// The few vector operations the CPU twins need, on the compiler's own vector types: one width for each
// instruction set, plain arithmetic operators, intrinsics only where the language has no word for it.
// Everything is `static` (see isa.h).
#pragma once

#include <cstdint>
#include <cstring>

#include "core/dtype.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#ifndef DEEPEN_ISA
#error "simd.h is for files compiled once per instruction set: see CMakeLists.txt"
#endif

namespace deepen {
namespace DEEPEN_ISA {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kWidth)));
typedef uint32_t BitsVec __attribute__((vector_size(4 * kWidth)));

static inline Vec broadcast(float value) { return value - Vec{}; }
static inline Vec load(const float* from) {
  Vec v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
static inline void store(float* to, Vec v) { std::memcpy(to, &v, sizeof v); }

static inline Vec load(const BFloat16* from) {
#if defined(__AVX512F__)
  return Vec(_mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)), 16)));
#elif defined(__AVX2__)
  return Vec(_mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from)), 16)));
#else
  Vec v;
  for (int i = 0; i < kWidth; ++i) v[i] = to_float(from[i]);
  return v;
#endif
}
static inline Vec load(const Half* from) {
#if defined(__AVX512F__)
  return Vec(_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from)));
#elif defined(__F16C__)
  return Vec(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from)));
#else
  Vec v;
  for (int i = 0; i < kWidth; ++i) v[i] = to_float(from[i]);
  return v;
#endif
}

// a > b ? a : b in each lane, so b where either is NaN. One instruction, which compilers do not find by
// themselves.
static inline Vec max(Vec a, Vec b) {
#if defined(__AVX512F__)
  return Vec(_mm512_max_ps(__m512(a), __m512(b)));
#elif defined(__AVX2__)
  return Vec(_mm256_max_ps(__m256(a), __m256(b)));
#elif defined(__SSE2__)
  return Vec(_mm_max_ps(__m128(a), __m128(b)));
#else
  return a > b ? a : b;
#endif
}

// One bit for each lane in which a > b.
static inline uint32_t greater_mask(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(__m512(a), __m512(b), _CMP_GT_OQ);
#elif defined(__AVX2__)
  return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(__m256(a), __m256(b), _CMP_GT_OQ)));
#else
  uint32_t mask = 0;
  for (int i = 0; i < kWidth; ++i) mask |= uint32_t(a[i] > b[i]) << i;
  return mask;
#endif
}

// table[index[i]] for each lane.
static inline Vec gather(const float* table, const int32_t* index) {
#if defined(__AVX512F__)
  return Vec(_mm512_i32gather_ps(_mm512_loadu_si512(index), table, 4));
#elif defined(__AVX2__)
  return Vec(_mm256_i32gather_ps(table, _mm256_loadu_si256((const __m256i*)index), 4));
#else
  Vec v;
  for (int i = 0; i < kWidth; ++i) v[i] = table[index[i]];
  return v;
#endif
}

static inline float sum_lanes(Vec v) {
  float lanes[kWidth];
  store(lanes, v);
  for (int half = kWidth / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}
static inline float max_lanes(Vec v) {
  float best = v[0];
  for (int i = 1; i < kWidth; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

// exp(x) for x <= 88, relative error below 1e-7 + 6e-8 |x| (with a fused multiply-add 1e-7 + 2e-8 |x|). NaN
// gives NaN; below -87 the result is that of -87, 1.6e-38, which no sum of probabilities can tell from 0.
static inline Vec exp(Vec x) {
  const Vec clamped = max(broadcast(-87.0f), x);
  // 2^y = 2^n 2^r with y = x / ln 2, |r| <= 1/2; adding 1.5 * 2^23 rounds to the nearest integer.
  const Vec per_ln2 = broadcast(1.44269504f), shift = broadcast(12582912.0f);
  const Vec shifted = clamped * per_ln2 + shift;
  const Vec r = clamped * per_ln2 - (shifted - shift);
  Vec p = broadcast(0.00132647273f);
  p = p * r + broadcast(0.00967151299f);
  p = p * r + broadcast(0.0555073284f);
  p = p * r + broadcast(0.240222439f);
  p = p * r + broadcast(0.693147004f);
  p = p * r + broadcast(1.0f);
  BitsVec bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + (127u << 23);  // only the integer's low bits survive the shift
  Vec scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return p * scale;
}

}  // namespace DEEPEN_ISA
}  // namespace deepen
