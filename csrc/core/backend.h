// Where an operation runs.
#pragma once

namespace deepen {

struct Backend {
  int threads;   // on the CPU: rows in parallel, at least 1
  int device;    // CUDA device, or -1 for the CPU
  void* stream;  // cudaStream_t of that device; null is its default stream
};

inline bool on_cpu(const Backend& backend) { return backend.device < 0; }

}  // namespace deepen
