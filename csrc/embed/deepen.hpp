/** @file
 * deepen.h for C++17: objects that free themselves, errors as exceptions. Everything is inline, so that the
 * compiler of the library and that of the program need not be one.
 */
#pragma once

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "deepen.h"

namespace deepen {

/// What a function of deepen.h came to that is not DEEPEN_OK, with deepen_error()'s words.
struct Error : std::runtime_error {
  explicit Error(deepen_status code) : std::runtime_error(deepen_error()), status(code) {}
  deepen_status status;
};

/// @throws Error for any status but DEEPEN_OK
inline void check(deepen_status status) {
  if (status != DEEPEN_OK) throw Error(status);
}

/// A member's relative rows.
class Map {
 public:
  /// Reads a file, as deepen_map_read().
  explicit Map(const std::string& path) {
    deepen_map* map = nullptr;
    check(deepen_map_read(path.c_str(), &map));
    map_.reset(map);
  }
  /// Copies rows, as deepen_map_create().
  Map(const int32_t* columns, const float* values, const float* rest, int64_t vocab, int64_t entries,
      int64_t anchors) {
    deepen_map* map = nullptr;
    check(deepen_map_create(columns, values, rest, vocab, entries, anchors, &map));
    map_.reset(map);
  }
  /// Tokens of the member.
  int64_t vocab() const { return deepen_map_vocab(map_.get()); }
  /// How many anchors the rows are over.
  int64_t anchors() const { return deepen_map_anchors(map_.get()); }
  /// For the functions of deepen.h; it stays this object's.
  const deepen_map* get() const { return map_.get(); }

 private:
  struct Free {
    void operator()(deepen_map* map) const { deepen_map_free(map); }
  };
  std::unique_ptr<deepen_map, Free> map_;
};

/// One member's logits [batch, vocab] of a step, contiguous; they stay the caller's.
struct Logits {
  Logits(float* data) : data(data), dtype(DEEPEN_F32) {}
  Logits(void* data, deepen_dtype dtype) : data(data), dtype(dtype) {}
  void* data;
  deepen_dtype dtype;
};

/// Steps of some members, the main model first. Serves one thread at a time.
class Fusion {
 public:
  /// As deepen_fusion_create(). The maps may be freed afterwards.
  explicit Fusion(const std::vector<const Map*>& maps,
                  const deepen_settings& settings = deepen_default_settings())
      : data_(maps.size()), dtypes_(maps.size()) {
    std::vector<const deepen_map*> handles;
    for (const Map* map : maps) handles.push_back(map->get());
    deepen_fusion* fusion = nullptr;
    check(deepen_fusion_create(handles.data(), int32_t(handles.size()), &settings, &fusion));
    fusion_.reset(fusion);
  }

  /// As deepen_fusion_step(): logits[0] are the fused ones afterwards. Allocates nothing either.
  /// @param logits   one entry for each member
  /// @param weights  [batch, members], each row sums to 1
  /// @param chosen   [batch] the most probable token of each row, or nullptr
  /// @param batch    rows
  /// @param stream   a cudaStream_t, or nullptr
  void step(const Logits* logits, const float* weights, int32_t* chosen, int64_t batch = 1,
            void* stream = nullptr) {
    for (size_t i = 0; i < data_.size(); ++i) {
      data_[i] = logits[i].data;
      dtypes_[i] = logits[i].dtype;
    }
    check(deepen_fusion_step(fusion_.get(), batch, data_.data(), dtypes_.data(), weights, chosen, stream));
  }
  /// The same; std::invalid_argument where the list has not one entry for each member.
  void step(std::initializer_list<Logits> logits, const float* weights, int32_t* chosen, int64_t batch = 1,
            void* stream = nullptr) {
    if (logits.size() != data_.size()) throw std::invalid_argument("logits of each member are needed");
    step(logits.begin(), weights, chosen, batch, stream);
  }

 private:
  struct Free {
    void operator()(deepen_fusion* fusion) const { deepen_fusion_free(fusion); }
  };
  std::unique_ptr<deepen_fusion, Free> fusion_;
  std::vector<void*> data_;
  std::vector<deepen_dtype> dtypes_;
};

}  // namespace deepen
