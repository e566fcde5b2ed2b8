// The product in relative_rows.cu: one block's tile of cosines, kTokens tokens by kTileAnchors anchors, in
// shared memory. 8 warps, each with a part of the tile in registers; the operands pass through two shared
// buffers kDepth columns at a time, the next ones on their way from memory. A float32 product is three tf32
// ones on the tensor cores (two where the embedding is 16 bits wide, which tf32 holds exactly). The product
// of 8 columns is rounded to the sum outside the tensor core, which only truncates. A cosine's bits depend on
// its token and anchor alone, whatever the tile.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/tensor_product.cuh"
#include "ops/relative_rows.h"

namespace deepen {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kTileAnchors = 128;
constexpr int kDepth = 16;                      // columns of the embedding in shared memory at a time
constexpr int kStride = kDepth + 4;             // of a row there: the fragments' loads meet no bank twice
constexpr int kQuads = kDepth / 4;              // of four columns, a thread's unit of loading
constexpr int kLines = kThreads / kQuads;       // rows loaded at once
constexpr int kScoreStride = kTileAnchors + 8;  // of a row of cosines: stores of pairs meet no bank twice
constexpr DEEPEN_HOST_DEVICE int tile_floats(
    int tokens) {  // shared memory of a tile: the buffers, then the cosines
  const int buffers = 2 * (tokens + kTileAnchors) * kStride, cosines = tokens * kScoreStride;
  return buffers > cosines ? buffers : cosines;
}

// Some of the tokens, centred and normalised.
struct Queries {
  int count;
  int width;             // dim, up to whole kDepth
  const float* queries;  // [count, width], 0 beyond dim
  const float* offsets;  // [count] query . mean
};

// A token's row, or null for an id outside the embedding: its values are NaN then, and so its status.
template <class T>
__device__ __forceinline__ const T* embedding_row(const RelativeRowsParams& params, int64_t id) {
  if (id < 0 || id >= params.vocab) return nullptr;
  return static_cast<const T*>(params.embedding) + id * params.dim;
}

// Four columns of an anchor's row as they lie in memory, so that nothing waits for them before they are put
// into shared memory.
template <class T>
struct Quad {
  using Raw = uint2;
};
template <>
struct Quad<float> {
  using Raw = uint4;
};
__device__ __forceinline__ uint4 pack_quad(const float (&four)[4]) {
  return {float_to_bits(four[0]), float_to_bits(four[1]), float_to_bits(four[2]), float_to_bits(four[3])};
}
template <class T>
__device__ __forceinline__ uint2 pack_quad(const T (&four)[4]) {
  return {four[0].bits | uint32_t(four[1].bits) << 16, four[2].bits | uint32_t(four[3].bits) << 16};
}
__device__ __forceinline__ float4 as_floats(const uint4& raw, float) {
  return {bits_to_float(raw.x), bits_to_float(raw.y), bits_to_float(raw.z), bits_to_float(raw.w)};
}
template <class T>
__device__ __forceinline__ float4 as_floats(const uint2& raw, T) {
  return {to_float(T{uint16_t(raw.x)}), to_float(T{uint16_t(raw.x >> 16)}), to_float(T{uint16_t(raw.y)}),
          to_float(T{uint16_t(raw.y >> 16)})};
}

// NaN where there is no row, 0 beyond its end. `whole`: quads are aligned and none crosses the end.
template <class T>
__device__ __forceinline__ typename Quad<T>::Raw load_quad(const T* row, int column, int dim, bool whole) {
  if (whole && row != nullptr && column < dim) {
    return *reinterpret_cast<const typename Quad<T>::Raw*>(row + column);
  }
  T four[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    from_float(NAN, &four[i]);
    if (row != nullptr) four[i] = column + i < dim ? row[column + i] : T{};
  }
  return pack_quad(four);
}

// shared[i * kScoreStride + j] = the cosine of queries token0 + i and anchor anchor0 + j, where both exist.
// `shared` is tile_floats(kTokens) floats. Begins and ends in a barrier.
template <class T, int kTokens>
__device__ __forceinline__ void cosine_tile(const RelativeRowsParams& params, const Queries& queries,
                                            int token0, int64_t anchor0, bool whole, float* shared) {
  constexpr bool kExact = sizeof(T) == 2;  // tf32 holds the anchors as they are
  constexpr int kTokenWarps = kTokens >= 32 ? 2 : 1, kAnchorWarps = kWarps / kTokenWarps;
  constexpr int kRows = kTokens / (16 * kTokenWarps), kColumns = kTileAnchors / (8 * kAnchorWarps);
  constexpr int kTokenLoads = (kTokens + kLines - 1) / kLines, kAnchorLoads = kTileAnchors / kLines;
  constexpr int kBuffer = (kTokens + kTileAnchors) * kStride;
  const int thread = int(threadIdx.x), lane = thread % 32, warp = thread / 32, g = lane / 4, t = lane % 4;
  // Threads side by side store rows that are four apart: those of neighbours begin where the others end.
  const int order = thread / kQuads, line = order / 8 * 8 + order % 2 * 4 + order / 2 % 4;
  const int quad = thread % kQuads * 4;

  // Beyond the last token or anchor the last one again: their cosines are not read.
  const float* token_rows[kTokenLoads];
  const T* anchor_rows[kAnchorLoads];
#pragma unroll
  for (int i = 0; i < kTokenLoads; ++i) {
    const int n = token0 + line + i * kLines;
    token_rows[i] = queries.queries + int64_t(n < queries.count ? n : queries.count - 1) * queries.width;
  }
#pragma unroll
  for (int i = 0; i < kAnchorLoads; ++i) {
    const int64_t a = anchor0 + line + i * kLines;
    anchor_rows[i] = embedding_row<T>(params, params.anchor_ids[a < params.anchors ? a : params.anchors - 1]);
  }

  float4 tokens[kTokenLoads];
  typename Quad<T>::Raw anchors[kAnchorLoads];
  const auto fetch = [&](int depth) {
#pragma unroll
    for (int i = 0; i < kTokenLoads; ++i) {
      if (line + i * kLines >= kTokens) continue;
      tokens[i] = *reinterpret_cast<const float4*>(token_rows[i] + depth + quad);
    }
#pragma unroll
    for (int i = 0; i < kAnchorLoads; ++i) {
      anchors[i] = load_quad(anchor_rows[i], depth + quad, int(params.dim), whole);
    }
  };
  const auto put = [&](float* buffer) {
#pragma unroll
    for (int i = 0; i < kTokenLoads; ++i) {
      if (line + i * kLines >= kTokens) continue;
      *reinterpret_cast<float4*>(buffer + (line + i * kLines) * kStride + quad) = tokens[i];
    }
#pragma unroll
    for (int i = 0; i < kAnchorLoads; ++i) {
      *reinterpret_cast<float4*>(buffer + (kTokens + line + i * kLines) * kStride + quad) =
          as_floats(anchors[i], T());
    }
  };

  const int warp_token = warp / kAnchorWarps * (16 * kRows);
  const int warp_anchor = warp % kAnchorWarps * (8 * kColumns);
  float sums[kRows][kColumns][4] = {};
  fetch(0);
  __syncthreads();  // the last tile's cosines have been read
  put(shared);
  __syncthreads();
  for (int depth = 0; depth < queries.width; depth += kDepth) {
    const bool last = depth + kDepth >= queries.width;
    const float* const now = shared + depth / kDepth % 2 * kBuffer;
    if (!last) fetch(depth + kDepth);
#pragma unroll
    for (int step = 0; step < kDepth; step += 8) {
      uint32_t b[kColumns][2], b_small[kColumns][2];
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const float* const from = now + (kTokens + warp_anchor + 8 * j + g) * kStride + step + t;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const SplitFloat parts = split_float(from[4 * i]);
          b[j][i] = kExact ? float_to_bits(from[4 * i]) : parts.big;
          b_small[j][i] = parts.small;
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float* const from = now + (warp_token + 16 * r + g) * kStride + step + t;
        uint32_t a[4], a_small[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const SplitFloat parts = split_float(from[i % 2 * 8 * kStride + i / 2 * 4]);
          a[i] = parts.big;
          a_small[i] = parts.small;
        }
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          float part[4] = {};
          multiply_tf32(part, a_small, b[j]);
          if (!kExact) multiply_tf32(part, a, b_small[j]);
          multiply_tf32(part, a, b[j]);
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[r][j][i] += part[i];
        }
      }
    }
    if (!last) put(shared + (depth / kDepth + 1) % 2 * kBuffer);
    __syncthreads();
  }

#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
    const int column = warp_anchor + 8 * j + 2 * t;
    const int64_t a = anchor0 + column;
    const float one = a < params.anchors ? params.anchor_inverse_norm[a] : 0.0f;
    const float other = a + 1 < params.anchors ? params.anchor_inverse_norm[a + 1] : 0.0f;
#pragma unroll
    for (int i = 0; i < 2 * kRows; ++i) {
      const int row = warp_token + 8 * i + g;
      const float offset = token0 + row < queries.count ? queries.offsets[token0 + row] : 0.0f;
      *reinterpret_cast<float2*>(shared + row * kScoreStride + column) = {
          (sums[i / 2][j][i % 2 * 2] - offset) * one, (sums[i / 2][j][i % 2 * 2 + 1] - offset) * other};
    }
  }
  __syncthreads();
}

}  // namespace
}  // namespace deepen
