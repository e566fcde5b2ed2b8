// A member's relative rows in the library's own memory.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "ops/relative_map.h"

namespace deepen {

struct FileError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

constexpr int64_t kMost = int64_t{1} << 22;  // tokens or anchors, as deepen_ext/space/map_checks.py has it

struct MapData {
  std::vector<int32_t> columns;  // [vocab, entries]; empty where the rows are dense
  std::vector<float> values;     // [vocab, entries]
  std::vector<float> rest;       // [vocab]; empty where the rows are dense
  int64_t vocab;
  int64_t entries;
  int64_t anchors;

  bool dense() const { return columns.empty(); }
  RelativeRows rows() const {
    return {dense() ? nullptr : columns.data(), values.data(), dense() ? nullptr : rest.data(), vocab,
            entries};
  }
};

// Throws std::runtime_error with what is wrong where a row is no distribution or names an anchor that is
// none: the operations index with the columns unchecked on CUDA.
void check_rows(const MapData& map);

// map_file.cc. Throws FileError.
MapData read_map(const std::string& path);

}  // namespace deepen
