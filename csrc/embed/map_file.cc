// Relative maps as deepen_ext/space/map_file.py writes them: a safetensors file, which is eight bytes with
// the length of its head, the head in JSON, and the tensors' bytes. Read without C++ streams; core/check.h
// says why.
#include <cmath>
#include <cstdio>
#include <memory>

#include "embed/json.h"
#include "embed/map_data.h"

namespace deepen {

constexpr uint64_t kLongestHead = 1 << 20;

namespace {

[[noreturn]] void damaged(const std::string& what) { throw std::runtime_error(what); }

int64_t whole(const Json& value, const char* name, int64_t least, int64_t most) {
  if (value.kind != Json::Kind::number || value.number != std::floor(value.number) ||
      !(value.number >= double(least) && value.number <= double(most))) {
    damaged(std::string(name) + " is missing or out of range");
  }
  return int64_t(value.number);
}

class File {
 public:
  explicit File(const std::string& path) : in_(std::fopen(path.c_str(), "rb"), &std::fclose) {
    if (in_ == nullptr) damaged("it cannot be opened");
    if (std::fseek(in_.get(), 0, SEEK_END) != 0) damaged("it cannot be read");
    size_ = uint64_t(std::ftell(in_.get()));
    uint64_t length = 0;
    read(0, &length, sizeof length);
    if (length > kLongestHead || length + 8 > size_) damaged("it is no safetensors file");
    std::string head(length, ' ');
    read(8, &head[0], length);
    head_ = read_json(head);
    data_ = 8 + length;
  }

  const Json& head() const { return head_; }

  template <class T>
  std::vector<T> tensor(const char* name, const char* dtype, const std::vector<int64_t>& shape) {
    const Json& entry = head_.at(name);
    const auto& sizes = entry.at("shape").list;
    const auto& places = entry.at("data_offsets").list;
    uint64_t count = 1;
    bool right = entry.at("dtype").string == dtype && sizes.size() == shape.size() && places.size() == 2;
    for (size_t i = 0; right && i < shape.size(); ++i) {
      right = sizes[i].number == double(shape[i]);
      count *= uint64_t(shape[i]);
    }
    if (!right) damaged(std::string(name) + " is missing, or of another shape or type");
    const auto most = int64_t(size_ - data_);
    const int64_t begin = whole(places[0], name, 0, most), end = whole(places[1], name, begin, most);
    if (uint64_t(end - begin) != count * sizeof(T)) damaged(std::string(name) + " is cut off");
    std::vector<T> values(count);
    read(data_ + uint64_t(begin), values.data(), count * sizeof(T));
    return values;
  }

 private:
  void read(uint64_t at, void* to, uint64_t bytes) {
    if (std::fseek(in_.get(), long(at), SEEK_SET) != 0 || std::fread(to, 1, bytes, in_.get()) != bytes) {
      damaged("it ends too early");
    }
  }

  std::unique_ptr<std::FILE, int (*)(std::FILE*)> in_;
  uint64_t size_ = 0, data_ = 0;
  Json head_;
};

MapData read(const std::string& path) {
  File file(path);
  const Json& metadata = file.head().at("__metadata__");
  if (metadata.at("format").string != "deepen-ext relative map 1")
    damaged("it is no relative map of this version");
  const Json facts = read_json(metadata.at("facts").string);
  MapData map;
  map.vocab = whole(facts.at("vocab_size"), "vocab_size", 1, kMost);
  map.anchors = whole(facts.at("anchors"), "anchors", 1, kMost);
  map.entries = whole(facts.at("entries"), "entries", 1, map.anchors);
  if (file.head().at("matrix").kind == Json::Kind::object) {
    map.entries = map.anchors;
    map.values = file.tensor<float>("matrix", "F32", {map.vocab, map.anchors});
  } else {
    const auto& shape = file.head().at("tokens").at("shape").list;
    if (shape.size() != 1 || shape[0].number != double(map.vocab)) {
      damaged("it has rows of some tokens only; in Python call fill() before save()");
    }
    const auto tokens = file.tensor<int32_t>("tokens", "I32", {map.vocab});
    for (int64_t token = 0; token < map.vocab; ++token) {
      if (tokens[size_t(token)] != token) damaged("its tokens are not in order");
    }
    map.columns = file.tensor<int32_t>("columns", "I32", {map.vocab, map.entries});
    map.values = file.tensor<float>("values", "F32", {map.vocab, map.entries});
    map.rest = file.tensor<float>("rest", "F32", {map.vocab});
  }
  check_rows(map);
  return map;
}

}  // namespace

MapData read_map(const std::string& path) {
  try {
    return read(path);
  } catch (const std::runtime_error& error) {
    throw FileError("the relative map " + path + " cannot be used: " + error.what());
  }
}

}  // namespace deepen
