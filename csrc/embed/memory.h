// Memory of the host or of a CUDA device, freed with its owner.
#pragma once

#include <cstddef>
#include <cstring>
#include <new>
#include <utility>

#include "core/cuda_device.h"

namespace deepen {

class Memory {
 public:
  Memory() = default;
  // device -1 is the host.
  Memory(int device, size_t bytes)
      : device_(device),
        start_(device < 0 ? ::operator new(bytes, std::align_val_t{64}) : allocate_on_device(device, bytes)) {
  }
  Memory(Memory&& other) noexcept : device_(other.device_), start_(std::exchange(other.start_, nullptr)) {}
  Memory& operator=(Memory&& other) noexcept {
    std::swap(device_, other.device_);
    std::swap(start_, other.start_);
    return *this;
  }
  ~Memory() {
    if (start_ == nullptr) return;
    if (device_ < 0) {
      ::operator delete(start_, std::align_val_t{64});
    } else {
      free_on_device(device_, start_);
    }
  }

  template <class T>
  T* as() const {
    return static_cast<T*>(start_);
  }

  // From the host's memory; on a device this waits until it is there.
  void fill(const void* from, size_t bytes) {
    if (device_ < 0) {
      std::memcpy(start_, from, bytes);
    } else {
      copy_to_device(device_, start_, from, bytes);
    }
  }

 private:
  int device_ = -1;
  void* start_ = nullptr;
};

}  // namespace deepen
