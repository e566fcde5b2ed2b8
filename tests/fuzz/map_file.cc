// Files of relative maps, out of bytes: refused as files, or a map whose rows a step can use.
//
// The first byte says what follows: 0, the whole file; else the head's JSON, whose length is put before it,
// and after a byte of 255, which no JSON has, the tensors.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "embed/deepen.h"
#include "embed/json.h"
#include "input.h"

namespace {

// A file in memory, whose content changes.
class File {
 public:
  File() : descriptor_(memfd_create("map", 0)), path_("/proc/self/fd/" + std::to_string(descriptor_)) {
    PROMISED(descriptor_ >= 0);
  }
  const char* path() const { return path_.c_str(); }
  void write(const std::string& content) {
    PROMISED(ftruncate(descriptor_, 0) == 0);
    PROMISED(pwrite(descriptor_, content.data(), content.size(), 0) == ssize_t(content.size()));
  }

 private:
  int descriptor_;
  std::string path_;
};

void use(const deepen_map* map) {
  deepen_settings settings = deepen_default_settings();
  const int64_t vocab = deepen_map_vocab(map);
  deepen_fusion* fusion = nullptr;
  fuzz::calls.count += 2;
  PROMISED(deepen_fusion_create(&map, 1, &settings, &fusion) == DEEPEN_OK);
  std::vector<float> logits(static_cast<size_t>(vocab), 0.25f);
  logits[size_t(vocab / 2)] = 3.0f;
  void* pointers[] = {logits.data()};
  const deepen_dtype dtypes[] = {DEEPEN_F32};
  const float weights[] = {1.0f};
  int32_t chosen = -1;
  PROMISED(deepen_fusion_step(fusion, 1, pointers, dtypes, weights, &chosen, nullptr) == DEEPEN_OK);
  PROMISED(chosen >= 0 && chosen < vocab);
  deepen_fusion_free(fusion);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  static File file;
  std::string content(reinterpret_cast<const char*>(data) + 1, size - 1);
  if (data[0] != 0) {
    const size_t end = std::min(content.find('\xff'), content.size());
    const std::string head = content.substr(0, end),
                      tensors = end < content.size() ? content.substr(end + 1) : "";
    const uint64_t length = head.size();
    content = std::string(reinterpret_cast<const char*>(&length), sizeof length) + head + tensors;
    ++fuzz::calls.count;
    try {
      deepen::read_json(head);
    } catch (const std::runtime_error&) {
    }
  }
  file.write(content);
  deepen_map* map = nullptr;
  ++fuzz::calls.count;
  const deepen_status status = deepen_map_read(file.path(), &map);
  PROMISED(status == DEEPEN_OK || status == DEEPEN_BAD_FILE);
  PROMISED((status == DEEPEN_OK) == (map != nullptr));
  if (map != nullptr) use(map);
  deepen_map_free(map);
  return 0;
}
