// Warpgroup matrix products of sm_90a: thin wrappers over PTX, for files that are compiled for sm_90a only.
// PTX ISA, wgmma.mma_async:
// https://docs.nvidia.com/cuda/parallel-thread-execution/#asynchronous-warpgroup-level-matrix-instructions
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace zigzag::cuda {

// Orders this thread's writes to shared memory before reads of it by the tensor cores that follow a barrier.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// All 128 threads of this thread's warpgroup.
__device__ __forceinline__ void warpgroup_barrier() {
  asm volatile("bar.sync %0, 128;" ::"r"(1 + threadIdx.x / 128) : "memory");  // barrier 0 is __syncthreads
}

// Before the first product, and whenever registers that a product takes were written otherwise.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most `kPending` committed groups are still running.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Descriptor of an operand [rows][64 elements of 16 bits] with 128-byte swizzle, 1024 bytes from 8 rows to the next 8.
// The same serves operands whose rows are their own and those whose rows are the summed dimension (transposed). Of the
// latter, `leading_bytes` leads from 64 elements of a row to the next 64; the former do not use it.
__device__ __forceinline__ uint64_t swizzled_operand(uint32_t address, int leading_bytes = 16) {
  constexpr uint64_t kSwizzle128 = 1ull << 62, kRows8 = 1024ull >> 4 << 32;
  const uint64_t leading = static_cast<uint64_t>(leading_bytes >> 4) << 16;
  return kSwizzle128 | kRows8 | leading | ((address & 0x3ffff) >> 4);
}

// Ties registers of products under way to this place: what reads them later is not moved before it.
template <int kTiles>
__device__ __forceinline__ void hold_accumulators(float (&d)[kTiles][4]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    asm volatile("" : "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])::"memory");
  }
}
template <int kSteps>
__device__ __forceinline__ void hold_fragments(uint32_t (&a)[kSteps][4]) {
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    asm volatile("" : "+r"(a[i][0]), "+r"(a[i][1]), "+r"(a[i][2]), "+r"(a[i][3])::"memory");
  }
}

// d [64, 64] = a [64, 16] * b [64, 16]^T, plus d if `accumulate`; both operands in shared memory. d[n][...] is the
// m16n8 accumulator of columns 8 n and on, for rows 16 * (warp of the warpgroup) and on. T is __half or __nv_bfloat16.
template <class T>
__device__ __forceinline__ void wgmma_m64n64k16(float (&d)[8][4], uint64_t a, uint64_t b, bool accumulate);

// d [64, 64] += a [64, 16] * b [16, 64], a as m16n8k16 fragments of the warps.
template <class T>
__device__ __forceinline__ void wgmma_m64n64k16(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b);

// The same with b [128, 16] and b [16, 128].
template <class T>
__device__ __forceinline__ void wgmma_m64n128k16(float (&d)[16][4], uint64_t a, uint64_t b, bool accumulate);
template <class T>
__device__ __forceinline__ void wgmma_m64n128k16(float (&d)[16][4], const uint32_t (&a)[4], uint64_t b);

// clang-format off
#define ZZ_WGMMA_D8(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define ZZ_WGMMA_D \
  ZZ_WGMMA_D8(0), ZZ_WGMMA_D8(1), ZZ_WGMMA_D8(2), ZZ_WGMMA_D8(3), ZZ_WGMMA_D8(4), ZZ_WGMMA_D8(5), ZZ_WGMMA_D8(6), ZZ_WGMMA_D8(7)
#define ZZ_WGMMA_M64N64K16(T, type)                                                                                    \
  template <>                                                                                                          \
  __device__ __forceinline__ void wgmma_m64n64k16<T>(float(&d)[8][4], uint64_t a, uint64_t b, bool accumulate) {       \
    asm volatile("{.reg .pred p; setp.ne.b32 p, %34, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type     \
                 " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "   \
                 "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, p, 1, 1, 0, 0;}"                   \
                 : ZZ_WGMMA_D                                                                                          \
                 : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));                                                 \
  }                                                                                                                    \
  template <>                                                                                                          \
  __device__ __forceinline__ void wgmma_m64n64k16<T>(float(&d)[8][4], const uint32_t(&a)[4], uint64_t b) {             \
    asm volatile("{.reg .pred p; setp.ne.b32 p, 1, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type       \
                 " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "   \
                 "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, p, 1, 1, 1;}"     \
                 : ZZ_WGMMA_D                                                                                          \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                                \
  }
ZZ_WGMMA_M64N64K16(__nv_bfloat16, "bf16")
ZZ_WGMMA_M64N64K16(__half, "f16")
#undef ZZ_WGMMA_M64N64K16
#define ZZ_WGMMA_D16 \
  ZZ_WGMMA_D, ZZ_WGMMA_D8(8), ZZ_WGMMA_D8(9), ZZ_WGMMA_D8(10), ZZ_WGMMA_D8(11), ZZ_WGMMA_D8(12), ZZ_WGMMA_D8(13), \
  ZZ_WGMMA_D8(14), ZZ_WGMMA_D8(15)
#define ZZ_WGMMA_M64N128K16(T, type)                                                                                   \
  template <>                                                                                                          \
  __device__ __forceinline__ void wgmma_m64n128k16<T>(float(&d)[16][4], uint64_t a, uint64_t b, bool accumulate) {     \
    asm volatile("{.reg .pred p; setp.ne.b32 p, %66, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type    \
                 " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "                  \
                 "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, "                    \
                 "%34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, "                    \
                 "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, %64, %65, p, 1, 1, 0, 0;}"    \
                 : ZZ_WGMMA_D16                                                                                        \
                 : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));                                                 \
  }                                                                                                                    \
  template <>                                                                                                          \
  __device__ __forceinline__ void wgmma_m64n128k16<T>(float(&d)[16][4], const uint32_t(&a)[4], uint64_t b) {           \
    asm volatile("{.reg .pred p; setp.ne.b32 p, 1, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type      \
                 " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "                  \
                 "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, "                    \
                 "%34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, "                    \
                 "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, {%64, %65, %66, %67}, %68, p, 1, 1, 1;}"\
                 : ZZ_WGMMA_D16                                                                                        \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                                \
  }
ZZ_WGMMA_M64N128K16(__nv_bfloat16, "bf16")
ZZ_WGMMA_M64N128K16(__half, "f16")
#undef ZZ_WGMMA_M64N128K16
#undef ZZ_WGMMA_D16
#undef ZZ_WGMMA_D
#undef ZZ_WGMMA_D8
// clang-format on

}  // namespace zigzag::cuda
