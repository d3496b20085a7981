// The prefill kernel's tile and its products on the warpgroup instructions of sm_90a. A warpgroup of four warps owns 64
// rows; its accumulators lie as those of mma.sync do, warp by warp, so all else is shared with mma_block.cuh.
#pragma once

#include "cuda/wgmma.cuh"
#include "kernels/prefill/fragments.cuh"
#include "kernels/prefill/swizzle.h"

namespace zigzag::prefill {

// Where the warpgroups own fewer rows than they have, they take the same ones, over different keys.
template <class T, int kHeadDim_, int kRowGroups = 2>
struct WgmmaBlock {
  static_assert(kHeadDim_ % 64 == 0, "rows are cut into blocks of 128 bytes");
  using Element = T;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kRowTiles = 1;
  static constexpr int kParts = 1, kPartDim = kHeadDim;  // as of MmaBlock
  static constexpr int kWarps = 8;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kBlocksPerSm = kHeadDim <= 128 ? 2 : 1;  // one computes weights while the other multiplies
  static constexpr int kRows = 64 * kRowGroups;
  static constexpr int kKeys = 64;
  static constexpr int kChunks = kHeadDim / 8;  // 16-byte chunks per row
  static constexpr int kThreadsPerRow = 8;
  static constexpr int kRowBytes = kSwizzledRowBytes;
  static constexpr int kKeyChunkBytes = kKeys * kRowBytes;
  static constexpr int kQueryBytes = kRows * kRowBytes * (kHeadDim / 64);
  static constexpr int kKeyBytes = kKeyChunkBytes * (kHeadDim / 64);
  static constexpr int kSharedBytes = kQueryBytes + 4 * kKeyBytes;  // Q, then two stages of K and V
  static constexpr int kAlignment = 1024;                           // of a period of the swizzle

  using Scores = float[kRowTiles][kKeys / 8][4];
  using Output = float[kRowTiles][kHeadDim / 8][4];

  static __device__ __forceinline__ int query_offset(int row, int chunk) { return swizzled_piece(kRows, row, chunk); }
  static __device__ __forceinline__ int key_offset(int row, int chunk) { return swizzled_piece(kKeys, row, chunk); }

  // What cp.async wrote becomes visible to the tensor cores, which read shared memory by another path.
  static __device__ __forceinline__ void publish() { fence_proxy_async(); }

  // Behind it no warp reads the queries of this one.
  static __device__ __forceinline__ void release_queries() { warpgroup_barrier(); }

  // scores = q . k for the warpgroup's rows.
  static __device__ __forceinline__ void multiply_queries(Scores& scores, uint32_t q_tile, uint32_t k_tile) {
    const uint32_t q_group = q_tile + threadIdx.x / 128 % kRowGroups * 64 * kRowBytes;
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
      const int block = step / 4, bytes = step % 4 * 32;
      wgmma_m64n64k16<T>(scores[0], swizzled_operand(q_group + block * kRows * kRowBytes + bytes),
                         swizzled_operand(k_tile + block * kKeyChunkBytes + bytes), step > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
  }

  // out += weights . v, the weights from registers.
  static __device__ __forceinline__ void multiply_values(Output& out, const Scores& weights, uint32_t v_tile) {
    uint32_t w[kKeys / 16][4];
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step) pack_weights<T>(w[step], weights[0], step);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step) {
#pragma unroll
      for (int block = 0; block < kHeadDim / 64; ++block) {
        auto& columns = reinterpret_cast<float (&)[8][4]>(out[0][8 * block]);
        wgmma_m64n64k16<T>(columns, w[step], swizzled_operand(v_tile + block * kKeyChunkBytes + step * 16 * kRowBytes));
      }
    }
    wgmma_commit();
    wgmma_wait<0>();
  }
};

}  // namespace zigzag::prefill
