// What the emulator's sources share and kernels do not see.
#pragma once

#include <cstddef>
#include <cstdint>

#include "emulator.h"

#define DEEPEN_EXPORT extern "C" __attribute__((visibility("default")))  // for tests in Python, by ctypes

namespace deepen {
namespace emulator {

constexpr uint32_t kPoison = 0x7fe1deadu;  // a quiet NaN as float, a wild index as integer

struct Settings {
  uint64_t seed = 0;
  size_t max_shared_bytes = 232448;  // sm_90
  int multiprocessors = 4;
  int devices = 2;  // so that a test can see whether the device guard does its work
};

extern Settings settings;
extern thread_local int current_device;

char* poisoned(size_t bytes);  // memory at a multiple of 128, to be freed
void poison(char* memory, size_t bytes);

// The most dynamic shared memory that a kernel has been allowed on a device. Other devices forget it.
size_t allowed_shared_bytes(const void* kernel, int device);
void forget_allowed();

cudaError_t failed(cudaError_t error);  // makes it the thread's last error

}  // namespace emulator
}  // namespace deepen
