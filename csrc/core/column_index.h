// Numbers the anchors that the candidates' rows touch: column -> 0, 1, 2, ... in order of first appearance.
// An open hash table in the caller's workspace, so that no array of |A| entries has to be cleared for every
// step.
#pragma once

#include <cstdint>

namespace deepen {

struct ColumnIndex {
  int32_t* columns;  // [capacity] the column in each slot, -1 if free
  int32_t* numbers;  // [capacity] its number
  int32_t capacity;  // a power of two, more than the columns ever put in
  int32_t shift;     // 32 - log2(capacity)
  int32_t size;      // columns numbered so far
};

// Half full at most: a look-up takes one or two probes.
static inline int32_t column_index_capacity(int64_t entries) {
  int32_t capacity = 16;
  while (capacity < 2 * entries) capacity *= 2;
  return capacity;
}

static inline void clear(ColumnIndex* index) {
  index->shift = 32 - __builtin_ctz(uint32_t(index->capacity));
  index->size = 0;
  for (int32_t i = 0; i < index->capacity; ++i) index->columns[i] = -1;
}

// The slot of the column, or the free slot where it would go. Multiplicative (Fibonacci) hashing, linear
// probing.
static inline int32_t slot_of(const ColumnIndex& index, int32_t column) {
  uint32_t slot = (uint32_t(column) * 2654435769u) >> index.shift;
  while (index.columns[slot] != column && index.columns[slot] != -1)
    slot = (slot + 1) & uint32_t(index.capacity - 1);
  return int32_t(slot);
}

static inline int32_t number_of(ColumnIndex* index, int32_t column) {
  const int32_t slot = slot_of(*index, column);
  if (index->columns[slot] == -1) {
    index->columns[slot] = column;
    index->numbers[slot] = index->size++;
  }
  return index->numbers[slot];
}

// -1 if the column was never numbered.
static inline int32_t find(const ColumnIndex& index, int32_t column) {
  const int32_t slot = slot_of(index, column);
  return index.columns[slot] == -1 ? -1 : index.numbers[slot];
}

}  // namespace deepen
