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

constexpr unsigned kMaxThreads = 1024;
constexpr unsigned kNoThread = ~0u;
unsigned running_thread();            // its number within the block; kNoThread between launches
bool is_shared(const void* address);  // in the shared memory of the block that runs

#ifdef DEEPEN_COUNT_BANKS
// Lanes of the warp have met, or it has ended: what follows does not run side by side with what was before.
void warp_met(unsigned warp, const char* kernel);
void forget_paths();  // a block begins
#else
inline void warp_met(unsigned, const char*) {}
inline void forget_paths() {}
#endif

void end_copies();  // what was copied to the device has arrived

cudaError_t failed(cudaError_t error);  // makes it the thread's last error

}  // namespace emulator
}  // namespace deepen
