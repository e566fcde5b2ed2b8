// How relative_rows.cu cuts a call: tokens into chunks that run together, a chunk into blocks of tokens, the
// anchors into tiles and strips of tiles; and the workspace that a chunk takes.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/arena.h"
#include "core/check.h"
#include "core/warp_list.cuh"
#include "ops/relative_rows.h"
#include "ops/relative_rows_tile.cuh"
#include "ops/topk_softmax.h"

namespace deepen {
namespace {

constexpr int kManyTokens = 64, kFewTokens = 16;    // of a block
constexpr int kManyResident = 2, kFewResident = 3;  // blocks on a multiprocessor
constexpr int kStripsWanted = 4;   // of a chunk of tokens: they divide the device's blocks well
constexpr int kListEntries = 256;  // cutting a list of m keys takes m * m comparisons
constexpr int64_t kChunkBytes = int64_t(64) << 20;

// Of a token's scores in one tile. In the first pass with `normalise`, `sum` is of their squares.
struct TileStats {
  float largest;
  float sum;  // of exp(score - largest)
};

// The tokens that run together, and what is kept of them in the workspace.
struct Chunk {
  int64_t first;         // of params.tokens
  int count;             // of them
  int width, tiles;      // dim, up to whole kDepth; of anchors
  float* queries;        // [count, width], as in Queries
  float* offsets;        // [count]
  float* factors;        // [count] of the cosines: temperature, or temperature / ||c||_2
  TileStats* stats;      // [count, tiles]
  uint64_t* candidates;  // [count, strips, entries], each strip's sorted, padded with 0
  float* scores;         // [count, anchors], where there are no lists
  void* workspace;       // of topk_softmax, there
};

size_t shared_bytes(int tokens, int64_t kept) {
  return tile_floats(tokens) * sizeof(float) +
         tokens * (sizeof(ListHead) + (kept > 0 ? list_capacity(kept) * sizeof(uint64_t) : 0));
}

// How a call is cut into chunks, and a chunk into blocks.
struct Shape {
  int64_t width, tiles, kept;  // kept: entries, or 0 where there are no lists
  int64_t chunk;               // tokens
  int tokens, multiprocessors;

  Shape(int64_t dim, int64_t anchors, int64_t entries, int64_t count, const Backend& backend)
      : width((dim + kDepth - 1) / kDepth * kDepth),
        tiles((anchors + kTileAnchors - 1) / kTileAnchors),
        kept(entries <= kListEntries ? entries : 0),
        tokens(count > kFewTokens ? kManyTokens : kFewTokens),
        multiprocessors(deepen::multiprocessors(backend.device)) {
    const size_t most = size_t(max_shared_bytes(backend.device));
    if (shared_bytes(tokens, kept) > most) tokens = kFewTokens;
    if (shared_bytes(tokens, kept) > most) kept = 0;
    DEEPEN_CHECK(shared_bytes(tokens, kept) <= most, "the similarity rows' kernel takes ",
                 shared_bytes(tokens, kept), " bytes of shared memory, device ", backend.device, " has ",
                 most);
    const int64_t token_bytes = width * 4 + tiles * 8 + (kept > 0 ? kept * 8 * kStripsWanted : anchors * 4);
    const int64_t fitting = kChunkBytes / token_bytes / tokens;
    const int64_t filling = std::max<int64_t>(resident(tokens) * multiprocessors / kStripsWanted, 1);
    chunk = std::min(count, tokens * std::max<int64_t>(kept > 0 ? std::min(fitting, filling) : fitting, 1));
  }

  static int resident(int tokens) { return tokens == kManyTokens ? kManyResident : kFewResident; }
  static int64_t blocks_of(int64_t count, int tokens) { return (count + tokens - 1) / tokens; }
  // The last chunk may be a small one.
  int tokens_of(int64_t count) const { return count > kFewTokens ? tokens : kFewTokens; }
  int64_t strips_of(int64_t count) const {
    const int size = tokens_of(count);
    const int64_t blocks = resident(size) * multiprocessors;
    return std::min(std::max<int64_t>(blocks / blocks_of(count, size), 1), tiles);
  }
  // Rows of candidates in any chunk: count * strips_of(count), rounded up.
  int64_t candidate_rows() const {
    const int64_t most = std::max(chunk, int64_t(kManyTokens) * kFewResident * multiprocessors);
    return kept > 0 ? std::min(most, chunk * tiles) : 0;
  }
};

Chunk lay_out(Arena& arena, const Shape& shape, int64_t anchors, int64_t entries) {
  Chunk chunk{};
  chunk.width = int(shape.width);
  chunk.tiles = int(shape.tiles);
  chunk.queries = take<float>(arena, shape.chunk * shape.width);
  chunk.offsets = take<float>(arena, shape.chunk);
  chunk.factors = take<float>(arena, shape.chunk);
  chunk.stats = take<TileStats>(arena, shape.chunk * shape.tiles);
  chunk.candidates = take<uint64_t>(arena, shape.candidate_rows() * entries);
  if (shape.kept > 0) return chunk;
  chunk.scores = take<float>(arena, shape.chunk * anchors);
  TopkSoftmaxParams scores{};
  scores.batch = shape.chunk;
  scores.vocab = anchors;
  scores.k = entries;
  chunk.workspace = take<char>(arena, int64_t(topk_softmax_cuda_workspace(&scores, 1)));
  return chunk;
}

}  // namespace
}  // namespace deepen
