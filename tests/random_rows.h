// Relative rows at random, for the programs that try libdeepen: each names `entries` anchors and sums to 1.
#pragma once

#include <cstdint>
#include <random>
#include <vector>

struct RandomRows {
  std::vector<int32_t> columns;
  std::vector<float> values, rest;
};

inline RandomRows random_rows(std::mt19937* random, int64_t vocab, int64_t anchors, int64_t entries) {
  std::uniform_real_distribution<float> share(0.0f, 1.0f);
  RandomRows rows;
  for (int64_t token = 0; token < vocab; ++token) {
    const auto first = int64_t((*random)() % uint64_t(anchors));
    float left = 1.0f;
    for (int64_t j = 0; j < entries; ++j) {
      const float value = left * (0.5f + 0.2f * share(*random));
      rows.columns.push_back(int32_t((first + 7 * j) % anchors));
      rows.values.push_back(value);
      left -= value;
    }
    rows.rest.push_back(left);
  }
  return rows;
}
