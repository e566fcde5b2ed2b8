// How many candidate keys the CPU twin of topk_softmax holds before it drops all but the k largest.
#pragma once

#include <cstdint>

namespace deepen {

constexpr int64_t kTopkBlock = 2048;  // logits looked at between two looks at the candidates

static inline int64_t topk_softmax_keys(int64_t vocab, int64_t k) {
  const int64_t room = 2 * k + 2 * kTopkBlock;  // after a cut to k, a whole block fits
  return room < vocab ? room : vocab;
}

}  // namespace deepen
