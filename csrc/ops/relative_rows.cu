// relative_rows on CUDA: product, softmax statistics and selection in one kernel, so that scores live in
// shared memory only. Operations: 2 * dim * anchors a token, as tf32 products on tensor cores (see
// relative_rows_tile.cuh); with `normalise` twice, because the softmax needs the whole row's 2-norm first.
// Bytes from memory: the anchors' embeddings once for the tokens that run together (58 MB for 45,589 of 640
// columns in 16 bits, for some 4,000 tokens on an H100), and a token's queries, 8 bytes of statistics a tile
// and 8 * entries a strip, written and read. From the L2, for each 64 tokens by 128 anchors, both's columns.
//
//   prepare_queries  a block of 256 threads a token: centred, normalised, and its product with the mean
//   score_strips     a block of 256 threads for 64 tokens (16 when there are no more) and a strip of anchors,
//                    in tiles of 128. Of a tile in shared memory a warp takes a token at a time: largest
//                    score, sum of exponentials, and keys above the token's bar into its list
//                    (warp_list.cuh). 64 tokens, so that two blocks share a multiprocessor and one's product
//                    runs beside the other's selection. As many strips as fill the device and no more: in a
//                    longer strip the bar is higher and fewer keys pass it.
//   find_factors     with `normalise`, between the two passes: a block a token, from the tiles' squares
//   merge_strips     a block of 256 threads a token: the tiles' statistics, the strips' lists, the results
//
// Statistics are kept by tile and not by strip, so that no bit of a row depends on the tokens that are
// computed with it or on the device. Entries above kListEntries, or lists that do not fit shared memory, take
// another path: score_strips stores the scores after all, kChunkBytes at a time, and topk_softmax selects.
#include <algorithm>
#include <cstdint>

#include "core/arena.h"
#include "core/warp_list.cuh"
#include "ops/relative_rows.h"
#include "ops/relative_rows_chunk.cuh"
#include "ops/relative_rows_tile.cuh"
#include "ops/topk_softmax.h"

namespace deepen {
namespace {

enum class Pass { squares, select, store };

template <class T>
__global__ void __launch_bounds__(kThreads) prepare_queries(RelativeRowsParams params, Chunk chunk) {
  DEEPEN_STATIC_SHARED(double, scratch, kMaxWarps);
  const int64_t n = blockIdx.x;
  const T* const row = embedding_row<T>(params, params.tokens[chunk.first + n]);
  float* const query = chunk.queries + n * chunk.width;
  double square = 0.0, offset = 0.0;
  for (int64_t i = threadIdx.x; i < chunk.width; i += kThreads) {
    float value = 0.0f;
    if (i < params.dim) value = (row ? to_float(row[i]) : NAN) - (params.mean ? params.mean[i] : 0.0f);
    query[i] = value;
    square += double(value) * double(value);
  }
  square = block_reduce(square, 0.0, Plus(), scratch);
  const float scale = square > 0.0 ? float(1.0 / sqrt(square)) : 0.0f;
  for (int64_t i = threadIdx.x; i < chunk.width; i += kThreads) {
    query[i] *= scale;  // written by this thread
    if (params.mean && i < params.dim) offset += double(query[i]) * double(params.mean[i]);
  }
  offset = block_reduce(offset, 0.0, Plus(), scratch);
  if (threadIdx.x != 0) return;
  chunk.offsets[n] = float(offset);
  chunk.factors[n] = params.normalise ? 1.0f : params.temperature;
}

template <class T, int kTokens>
__global__ void __launch_bounds__(kThreads, kTokens == kManyTokens ? kManyResident : kFewResident)
    score_strips(RelativeRowsParams params, Chunk chunk, Pass pass, int strips, bool whole) {
  DEEPEN_SHARED(float, scores);
  ListHead* const heads = reinterpret_cast<ListHead*>(scores + tile_floats(kTokens));
  uint64_t* const keys = reinterpret_cast<uint64_t*>(heads + kTokens);
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, entries = int(params.entries);
  const int token_tiles = (chunk.count + kTokens - 1) / kTokens;
  const int token0 = int(blockIdx.x) % token_tiles * kTokens;  // neighbours share their anchors
  const int strip = int(blockIdx.x) / token_tiles;
  const int begin = int(int64_t(chunk.tiles) * strip / strips);
  const int end = int(int64_t(chunk.tiles) * (strip + 1) / strips);
  const Queries queries{chunk.count, chunk.width, chunk.queries, chunk.offsets};

  for (int row = warp; row < kTokens; row += kWarps) WarpList{nullptr, entries}.store(heads[row]);
  for (int tile = begin; tile < end; ++tile) {
    const int64_t anchor0 = int64_t(tile) * kTileAnchors;
    const int anchors =
        int(params.anchors - anchor0 < kTileAnchors ? params.anchors - anchor0 : kTileAnchors);
    cosine_tile<T, kTokens>(params, queries, token0, anchor0, whole, scores);
    for (int row = warp; row < kTokens && token0 + row < chunk.count; row += kWarps) {
      const int64_t n = token0 + row;
      const float factor = chunk.factors[n];
      const auto score = [&](int a) { return scores[row * kScoreStride + a] * factor; };
      float largest = -INFINITY, sum = 0.0f;
      if (pass == Pass::store) {
        for (int a = lane; a < anchors; a += 32) chunk.scores[n * params.anchors + anchor0 + a] = score(a);
        continue;
      }
      if (pass == Pass::squares) {
        for (int a = lane; a < anchors; a += 32) sum += score(a) * score(a);
      } else {
        for (int a = lane; a < anchors; a += 32) largest = fmaxf(largest, score(a));
        largest = warp_reduce(largest, Larger());
        const float base = largest == -INFINITY ? 0.0f : largest;  // all NaN
        for (int a = lane; a < anchors; a += 32) sum += __expf(score(a) - base);
        WarpList list{keys + row * list_capacity(entries), entries};
        list.load(heads[row]);
        for (int a = lane; a - lane < anchors; a += 32) {
          list.offer(a < anchors ? pack_key(score(a), uint32_t(anchor0 + a)) : 0);
        }
        list.store(heads[row]);
      }
      sum = warp_reduce(sum, Plus());
      if (lane == 0) chunk.stats[n * chunk.tiles + tile] = {largest, sum};
    }
  }

  if (pass != Pass::select) return;
  for (int row = warp; row < kTokens && token0 + row < chunk.count; row += kWarps) {
    WarpList list{keys + row * list_capacity(entries), entries};
    list.load(heads[row]);
    uint64_t* const out = chunk.candidates + (int64_t(token0 + row) * strips + strip) * entries;
    for (int i = list.count + lane; i < entries; i += 32) out[i] = 0;
    list.ranked([out](int rank, uint64_t key) { out[rank] = key; });
  }
}

__global__ void __launch_bounds__(kThreads) find_factors(RelativeRowsParams params, Chunk chunk) {
  DEEPEN_STATIC_SHARED(double, scratch, kMaxWarps);
  const int64_t n = blockIdx.x;
  double square = 0.0;
  for (int64_t tile = threadIdx.x; tile < chunk.tiles; tile += kThreads) {
    square += double(chunk.stats[n * chunk.tiles + tile].sum);
  }
  square = block_reduce(square, 0.0, Plus(), scratch);
  const float factor = square > 0.0 ? float(double(params.temperature) / sqrt(square)) : 0.0f;
  if (threadIdx.x == 0) chunk.factors[n] = factor;
}

__global__ void __launch_bounds__(kThreads) merge_strips(RelativeRowsParams params, Chunk chunk, int strips) {
  constexpr int kAhead = 4;  // strips whose keys are on their way together
  DEEPEN_STATIC_SHARED(float, scratch, kMaxWarps);
  DEEPEN_STATIC_SHARED(ListHead, heads, kWarps);
  DEEPEN_SHARED(uint64_t, lists);  // [kWarps + 1, capacity], the last one sorted
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, entries = int(params.entries);
  const int capacity = list_capacity(entries);
  const int64_t n = blockIdx.x, to = chunk.first + n;

  TileStats mine{-INFINITY, 0.0f};
  for (int64_t tile = threadIdx.x; tile < chunk.tiles; tile += kThreads) {
    const TileStats other = chunk.stats[n * chunk.tiles + tile];
    const float most = fmaxf(mine.largest, other.largest), base = most == -INFINITY ? 0.0f : most;
    mine = {most, mine.sum * expf(mine.largest - base) + other.sum * expf(other.largest - base)};
  }
  const float largest = block_reduce(mine.largest, -INFINITY, Larger(), scratch);
  const float scale = mine.largest == -INFINITY ? 1.0f : expf(mine.largest - largest);  // 1: 0 or NaN stays
  const float sum = block_reduce(mine.sum * scale, 0.0f, Plus(), scratch);

  WarpList list{lists + warp * capacity, entries};
  const uint64_t* const candidates = chunk.candidates + n * strips * entries;
  for (int strip = warp; strip < strips; strip += kAhead * kWarps) {
    bool more = true;
    for (int from = lane; more && from - lane < entries; from += 32) {  // each is sorted
      uint64_t keys[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int at = strip + i * kWarps;
        keys[i] = at < strips && from < entries ? candidates[int64_t(at) * entries + from] : 0;
      }
      more = false;
#pragma unroll
      for (int i = 0; i < kAhead; ++i) more = list.offer(keys[i]) || more;
    }
  }
  list.store(heads[warp]);
  __syncthreads();

  uint64_t* const sorted = lists + kWarps * capacity;
  if (warp == 0) {
    for (int other = 1; other < kWarps; ++other) {
      const int count = heads[other].count;
      for (int i = lane; i - lane < count; i += 32) list.offer(i < count ? lists[other * capacity + i] : 0);
    }
    list.ranked([sorted](int rank, uint64_t key) { sorted[rank] = key; });
  }
  __syncthreads();
  float kept = 0.0f;
  for (int i = int(threadIdx.x); i < entries; i += kThreads) {
    const float weight = expf(key_value(sorted[i]) - largest);
    params.columns[to * entries + i] = int32_t(key_index(sorted[i]));
    params.values[to * entries + i] = weight / sum;
    kept += weight;
  }
  kept = block_reduce(kept, 0.0f, Plus(), scratch);
  if (threadIdx.x != 0) return;
  // All anchors leave nothing; rounding must not leave a trace of it.
  const bool nothing_left = params.entries == params.anchors || kept >= sum;
  params.rest[to] = nothing_left ? 0.0f : (sum - kept) / sum;
  params.status[to] = sum != sum ? kRowNotFinite : largest == -INFINITY ? kRowEmpty : kRowOk;
}

template <class T>
void launch(const RelativeRowsParams& params, const Backend& backend) {
  const Shape shape(params.dim, params.anchors, params.entries, params.count, backend);
  const bool whole =
      params.dim % 4 == 0 && reinterpret_cast<uintptr_t>(params.embedding) % (4 * sizeof(T)) == 0;
  const auto stream = backend.stream;
  Arena arena{static_cast<char*>(params.workspace)};
  Chunk chunk = lay_out(arena, shape, params.anchors, params.entries);
  for (chunk.first = 0; chunk.first < params.count; chunk.first += shape.chunk) {
    chunk.count = int(std::min(shape.chunk, params.count - chunk.first));
    const unsigned rows = unsigned(chunk.count);
    const int tokens = shape.tokens_of(chunk.count), strips = int(shape.strips_of(chunk.count));
    const auto score = [&](Pass pass) {
      const unsigned blocks = unsigned(Shape::blocks_of(chunk.count, tokens) * strips);
      const size_t bytes = shared_bytes(tokens, pass == Pass::select ? shape.kept : 0);
      if (tokens == kManyTokens) {
        DEEPEN_LAUNCH((score_strips<T, kManyTokens>), blocks, kThreads, bytes, stream, params, chunk, pass,
                      strips, whole);
      } else {
        DEEPEN_LAUNCH((score_strips<T, kFewTokens>), blocks, kThreads, bytes, stream, params, chunk, pass,
                      strips, whole);
      }
    };
    DEEPEN_LAUNCH((prepare_queries<T>), rows, kThreads, 0, stream, params, chunk);
    if (params.normalise) {
      score(Pass::squares);
      DEEPEN_LAUNCH(find_factors, rows, kThreads, 0, stream, params, chunk);
    }
    if (shape.kept > 0) {
      const size_t bytes = (kWarps + 1) * list_capacity(shape.kept) * sizeof(uint64_t);
      score(Pass::select);
      DEEPEN_LAUNCH(merge_strips, rows, kThreads, bytes, stream, params, chunk, strips);
    } else {
      score(Pass::store);
      const TopkSoftmaxParams scores{chunk.scores,
                                     params.columns + chunk.first * params.entries,
                                     params.values + chunk.first * params.entries,
                                     params.rest + chunk.first,
                                     params.status + chunk.first,
                                     chunk.count,
                                     params.anchors,
                                     params.entries,
                                     Dtype::f32};
      topk_softmax_cuda(&scores, 1, chunk.workspace, backend);
    }
  }
}

}  // namespace

size_t relative_rows_cuda_workspace(int64_t dim, int64_t anchors, int64_t entries, int64_t count,
                                    const Backend& backend) {
  Arena arena{nullptr};
  lay_out(arena, Shape(dim, anchors, entries, count, backend), anchors, entries);
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
