#include "embed/map_data.h"

#include <cmath>
#include <string>

namespace deepen {

constexpr double kSumError = 1e-3;  // as deepen_ext/space/row_table.py has it
constexpr float kRounding = 1e-5f;

static void check_row(const MapData& map, int64_t token, std::vector<int64_t>* seen) {
  const auto wrong = [token](const char* what) {
    throw std::runtime_error("the row of token " + std::to_string(token) + " " + what);
  };
  double sum = 0;
  bool ended = false;
  for (int64_t j = 0; j < map.entries; ++j) {
    const float value = map.values[size_t(token * map.entries + j)];
    if (!map.dense()) {
      const int32_t column = map.columns[size_t(token * map.entries + j)];
      if (column < -1 || column >= map.anchors) wrong("names an anchor that there is not");
      ended = ended || column < 0;
      if (column >= 0) {
        if (ended) wrong("goes on after its end");
        if ((*seen)[size_t(column)] == token) wrong("names an anchor twice");
        (*seen)[size_t(column)] = token;
      }
      if (ended) continue;
    }
    if (!(value >= 0)) wrong("has a value that is negative or no number");
    sum += value;
  }
  if (!map.dense()) {
    const float rest = map.rest[size_t(token)];
    if (!(rest >= -kRounding && rest <= 1 + kRounding)) wrong("has a rest that is not between 0 and 1");
    sum += rest;
  }
  if (!(std::fabs(sum - 1) <= kSumError)) wrong("does not sum to 1");
}

void check_rows(const MapData& map) {
  std::vector<int64_t> seen(size_t(map.dense() ? 0 : map.anchors),
                            -1);  // by anchor, the last token that names it
  for (int64_t token = 0; token < map.vocab; ++token) check_row(map, token, &seen);
}

}  // namespace deepen
