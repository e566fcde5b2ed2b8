// DEEPEN_HOST_DEVICE marks the few functions that the CPU twins and the CUDA kernels share.
#pragma once

#ifdef __CUDACC__
#define DEEPEN_HOST_DEVICE __host__ __device__
#else
#define DEEPEN_HOST_DEVICE
#endif
