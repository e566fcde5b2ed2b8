// relative_rows on CUDA: some hundred tokens at a time, so that [count, anchors] is never stored, but only a
// tile of scores of up to kTileBytes. Operations: 2 * dim * anchors a token, on tensor cores as three tf32
// products for one of float32 (two where the embedding is 16 bits wide, which tf32 holds exactly). Bytes: a
// tile reads the anchors' embeddings once (anchors * dim elements: 128 tokens make 64 to 128 operations of
// each byte) and writes and reads its scores, 8 bytes for 2 * dim operations: that is why the selection is
// topk_softmax's own kernels and not fused into the product.
//
//   prepare_tile    a block of 256 threads a token: centred, normalised, and its product with the mean
//   score_tile      a block of 256 threads for 128 tokens and 128 anchors (16 tokens when there are no more):
//                   8 warps, each with a part of the block's scores in registers; the operands pass through
//                   two shared buffers kDepth columns at a time, the next ones on their way from memory. The
//                   product of 8 columns is rounded to the sum outside the tensor core, which only truncates.
//   normalise_tile  with `normalise`: a block a token, the scores over their 2-norm
//   topk_softmax    of the tile
#include <algorithm>
#include <cmath>

#include "core/arena.h"
#include "core/check.h"
#include "core/tensor_product.cuh"
#include "ops/relative_rows.h"
#include "ops/topk_softmax.h"

namespace deepen {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kManyTokens = 128, kFewTokens = 16, kTileAnchors = 128;
constexpr int kDepth = 16;                 // columns of the embedding in shared memory at a time
constexpr int kStride = kDepth + 4;        // of a row there: the fragments' loads meet no bank twice
constexpr int kQuads = kDepth / 4;         // of four columns, a thread's unit of loading
constexpr int kLines = kThreads / kQuads;  // rows loaded at once
constexpr int64_t kTileBytes = int64_t(64) << 20;

struct Tile {
  int64_t first, count;  // which of params.tokens
  int64_t width;         // dim, up to whole kDepth
  float* queries;        // [tokens, width] centred, normalised, 0 beyond dim
  float* offsets;        // [tokens] query . mean
  float* scores;         // [tokens, anchors]
  void* workspace;       // of topk_softmax
};

int64_t tile_tokens(int64_t anchors, int64_t count) {
  const int64_t fitting = kTileBytes / (anchors * int64_t(sizeof(float))) / kManyTokens * kManyTokens;
  return std::min(std::max<int64_t>(fitting, kManyTokens), count);
}

Tile lay_out(Arena& arena, int64_t dim, int64_t anchors, int64_t entries, int64_t count) {
  const int64_t tokens = tile_tokens(anchors, count);
  Tile tile{};
  tile.width = (dim + kDepth - 1) / kDepth * kDepth;
  tile.queries = take<float>(arena, tokens * tile.width);
  tile.offsets = take<float>(arena, tokens);
  tile.scores = take<float>(arena, tokens * anchors);
  tile.workspace = take<char>(arena, int64_t(topk_softmax_cuda_workspace(tokens, anchors, entries)));
  return tile;
}

// A token's row, or null for an id outside the embedding: its values are NaN then, and so its status.
template <class T>
__device__ __forceinline__ const T* embedding_row(const RelativeRowsParams& params, int64_t id) {
  if (id < 0 || id >= params.vocab) return nullptr;
  return static_cast<const T*>(params.embedding) + id * params.dim;
}

template <class T>
__global__ void __launch_bounds__(kThreads) prepare_tile(RelativeRowsParams params, Tile tile) {
  DEEPEN_STATIC_SHARED(double, scratch, kMaxWarps);
  const int64_t n = blockIdx.x;
  const T* const row = embedding_row<T>(params, params.tokens[tile.first + n]);
  float* const query = tile.queries + n * tile.width;
  double square = 0.0, offset = 0.0;
  for (int64_t i = threadIdx.x; i < tile.width; i += kThreads) {
    float value = 0.0f;
    if (i < params.dim) value = (row ? to_float(row[i]) : NAN) - (params.mean ? params.mean[i] : 0.0f);
    query[i] = value;
    square += double(value) * double(value);
  }
  square = block_reduce(square, 0.0, Plus(), scratch);
  const float scale = square > 0.0 ? float(1.0 / sqrt(square)) : 0.0f;
  for (int64_t i = threadIdx.x; i < tile.width; i += kThreads) {
    query[i] *= scale;  // written by this thread
    if (params.mean && i < params.dim) offset += double(query[i]) * double(params.mean[i]);
  }
  offset = block_reduce(offset, 0.0, Plus(), scratch);
  if (threadIdx.x == 0) tile.offsets[n] = float(offset);
}

__device__ __forceinline__ float4 as_floats(const float4& four, float) { return four; }
template <class T>
__device__ __forceinline__ float4 as_floats(const uint2& four, T) {
  return {to_float(T{uint16_t(four.x)}), to_float(T{uint16_t(four.x >> 16)}), to_float(T{uint16_t(four.y)}),
          to_float(T{uint16_t(four.y >> 16)})};
}
template <class T>
struct Four {
  using Type = uint2;
};
template <>
struct Four<float> {
  using Type = float4;
};

// Four columns of an anchor's row; `fill` where there is no row, 0 beyond its end. `whole`: quads are aligned
// and none crosses the end.
template <class T>
__device__ __forceinline__ float4 load_quad(const T* row, int64_t column, int64_t dim, bool whole,
                                            float fill) {
  if (row == nullptr) return {fill, fill, fill, fill};
  if (column >= dim) return {0.0f, 0.0f, 0.0f, 0.0f};
  if (whole) return as_floats(*reinterpret_cast<const typename Four<T>::Type*>(row + column), T());
  return {to_float(row[column]), column + 1 < dim ? to_float(row[column + 1]) : 0.0f,
          column + 2 < dim ? to_float(row[column + 2]) : 0.0f,
          column + 3 < dim ? to_float(row[column + 3]) : 0.0f};
}

template <class T, int kTokens, int kTokenWarps>
__global__ void __launch_bounds__(kThreads) score_tile(RelativeRowsParams params, Tile tile, bool whole) {
  constexpr bool kExact = sizeof(T) == 2;  // tf32 holds the anchors as they are
  constexpr int kAnchorWarps = kWarps / kTokenWarps;
  constexpr int kRows = kTokens / (16 * kTokenWarps), kColumns = kTileAnchors / (8 * kAnchorWarps);
  constexpr int kTokenLoads = (kTokens + kLines - 1) / kLines, kAnchorLoads = kTileAnchors / kLines;
  constexpr int kBuffer = (kTokens + kTileAnchors) * kStride;
  DEEPEN_SHARED(float, shared);

  const int thread = int(threadIdx.x), lane = thread % 32, warp = thread / 32, g = lane / 4, t = lane % 4;
  const int line = thread / kQuads, quad = thread % kQuads * 4;
  const int token_tiles = int((tile.count + kTokens - 1) / kTokens);
  const int64_t token0 = int64_t(blockIdx.x) % token_tiles * kTokens;  // neighbours share their anchors
  const int64_t anchor0 = int64_t(blockIdx.x) / token_tiles * kTileAnchors;

  const float* token_rows[kTokenLoads];
  const T* anchor_rows[kAnchorLoads];
  float fills[kAnchorLoads];
#pragma unroll
  for (int i = 0; i < kTokenLoads; ++i) {
    const int64_t n = token0 + line + i * kLines;
    const bool exists = line + i * kLines < kTokens && n < tile.count;
    token_rows[i] = exists ? tile.queries + n * tile.width : nullptr;
  }
#pragma unroll
  for (int i = 0; i < kAnchorLoads; ++i) {
    const int64_t a = anchor0 + line + i * kLines;
    anchor_rows[i] = a < params.anchors ? embedding_row<T>(params, params.anchor_ids[a]) : nullptr;
    fills[i] = a < params.anchors ? NAN : 0.0f;
  }

  float4 tokens[kTokenLoads], anchors[kAnchorLoads];
  const auto fetch = [&](int64_t depth) {
#pragma unroll
    for (int i = 0; i < kTokenLoads; ++i) {
      tokens[i] = load_quad(token_rows[i], depth + quad, tile.width, true, 0.0f);
    }
#pragma unroll
    for (int i = 0; i < kAnchorLoads; ++i) {
      anchors[i] = load_quad(anchor_rows[i], depth + quad, params.dim, whole, fills[i]);
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
      *reinterpret_cast<float4*>(buffer + (kTokens + line + i * kLines) * kStride + quad) = anchors[i];
    }
  };

  const int warp_token = warp / kAnchorWarps * (16 * kRows),
            warp_anchor = warp % kAnchorWarps * (8 * kColumns);
  float sums[kRows][kColumns][4] = {};
  fetch(0);
  put(shared);
  __syncthreads();
  for (int64_t depth = 0; depth < tile.width; depth += kDepth) {
    const bool last = depth + kDepth >= tile.width;
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

  const float factor = params.normalise ? 1.0f : params.temperature;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t n = token0 + warp_token + 16 * r + g + i / 2 * 8;
        const int64_t a = anchor0 + warp_anchor + 8 * j + 2 * t + i % 2;
        if (n >= tile.count || a >= params.anchors) continue;
        const float cosine = (sums[r][j][i] - tile.offsets[n]) * params.anchor_inverse_norm[a];
        tile.scores[n * params.anchors + a] = cosine * factor;
      }
    }
  }
}

__global__ void __launch_bounds__(kThreads) normalise_tile(RelativeRowsParams params, Tile tile) {
  DEEPEN_STATIC_SHARED(double, scratch, kMaxWarps);
  float* const scores = tile.scores + int64_t(blockIdx.x) * params.anchors;
  double square = 0.0;
  for (int64_t a = threadIdx.x; a < params.anchors; a += kThreads)
    square += double(scores[a]) * double(scores[a]);
  square = block_reduce(square, 0.0, Plus(), scratch);
  const float factor = square > 0.0 ? float(double(params.temperature) / sqrt(square)) : 0.0f;
  for (int64_t a = threadIdx.x; a < params.anchors; a += kThreads) scores[a] *= factor;
}

template <class T, int kTokens, int kTokenWarps>
void launch_scores(const RelativeRowsParams& params, const Tile& tile, const Backend& backend) {
  const bool whole =
      params.dim % 4 == 0 && reinterpret_cast<uintptr_t>(params.embedding) % (4 * sizeof(T)) == 0;
  const int64_t blocks =
      (tile.count + kTokens - 1) / kTokens * ((params.anchors + kTileAnchors - 1) / kTileAnchors);
  const size_t bytes = 2 * (kTokens + kTileAnchors) * kStride * sizeof(float);
  DEEPEN_LAUNCH((score_tile<T, kTokens, kTokenWarps>), unsigned(blocks), kThreads, bytes, backend.stream,
                params, tile, whole);
}

template <class T>
void launch(const RelativeRowsParams& params, const Backend& backend) {
  Arena arena{static_cast<char*>(params.workspace)};
  Tile tile = lay_out(arena, params.dim, params.anchors, params.entries, params.count);
  const int64_t tokens = tile_tokens(params.anchors, params.count);
  for (tile.first = 0; tile.first < params.count; tile.first += tokens) {
    tile.count = std::min(tokens, params.count - tile.first);
    DEEPEN_LAUNCH((prepare_tile<T>), unsigned(tile.count), kThreads, 0, backend.stream, params, tile);
    if (tile.count <= kFewTokens) {
      launch_scores<T, kFewTokens, 1>(params, tile, backend);
    } else {
      launch_scores<T, kManyTokens, 2>(params, tile, backend);
    }
    if (params.normalise) {
      DEEPEN_LAUNCH(normalise_tile, unsigned(tile.count), kThreads, 0, backend.stream, params, tile);
    }
    topk_softmax_cuda(
        {tile.scores, params.columns + tile.first * params.entries,
         params.values + tile.first * params.entries, params.rest + tile.first, params.status + tile.first,
         tile.workspace, tile.count, params.anchors, params.entries, Dtype::f32},
        backend);
  }
}

}  // namespace

size_t relative_rows_cuda_workspace(int64_t dim, int64_t anchors, int64_t entries, int64_t count) {
  Arena arena{nullptr};
  lay_out(arena, dim, anchors, entries, count);
  return arena.used;
}

void relative_rows_cuda(const RelativeRowsParams& params, const Backend& backend) {
  const DeviceGuard guard(backend.device);
  switch (params.dtype) {
    case Dtype::f32: return launch<float>(params, backend);
    case Dtype::f16: return launch<Half>(params, backend);
    case Dtype::bf16: return launch<BFloat16>(params, backend);
  }
}

}  // namespace deepen
