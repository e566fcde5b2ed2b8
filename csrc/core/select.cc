#include "core/select.h"

#include <algorithm>
#include <functional>

namespace deepen {

void keep_largest(uint64_t* keys, int64_t count, int64_t kept) {
  if (kept < count) std::nth_element(keys, keys + kept, keys + count, std::greater<uint64_t>());
}

void sort_down(uint64_t* keys, int64_t count) { std::sort(keys, keys + count, std::greater<uint64_t>()); }

}  // namespace deepen
