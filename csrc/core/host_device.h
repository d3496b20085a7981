// Functions that host and device code share.
#pragma once

#if defined(__CUDACC__)
#define ZZ_HOST_DEVICE __host__ __device__ __forceinline__
#else
// Always inlined: a function that the CPU kernels of two instruction sets share by name must not be a symbol.
#define ZZ_HOST_DEVICE __attribute__((always_inline)) inline
#endif
