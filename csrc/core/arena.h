// Cuts a caller's workspace into aligned arrays. With a null base it only adds up the size, so that the
// function that lays a workspace out is also the one that says how large it must be. Everything is `static`
// (see isa.h).
#pragma once

#include <cstddef>
#include <cstdint>

namespace deepen {

struct Arena {
  char* base;
  size_t used = 0;
};

constexpr size_t kArenaAlignment = 64;

template <class T>
static T* take(Arena& arena, int64_t count) {
  T* start = arena.base == nullptr ? nullptr : reinterpret_cast<T*>(arena.base + arena.used);
  arena.used += (size_t(count) * sizeof(T) + kArenaAlignment - 1) / kArenaAlignment * kArenaAlignment;
  return start;
}

}  // namespace deepen
