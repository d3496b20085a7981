// The prefill kernel's tile and its products on mma.sync: every GPU from sm_80 on.
#pragma once

#include "kernels/prefill/fragments.cuh"

namespace zigzag::prefill {

template <class T, int kHeadDim_>
struct MmaBlock {
  using Element = T;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kWide = kHeadDim > 128;  // two row tiles of output would not fit in the registers
  static constexpr int kRowTiles =
      kWide ? 1 : 2;  // 16-row tensor core tiles per warp: two halve the shared memory reads
  // Warps that share their rows, of which each has a part of the output: of one row tile of 512 dims there is no room
  // for all of it. Each calculates all scores of its rows.
  static constexpr int kParts = kHeadDim > 256 ? 2 : 1;
  static constexpr int kPartDim = kHeadDim / kParts;
  static constexpr int kWarps = 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kBlocksPerSm = kHeadDim <= 64 ? 3 : 2;  // as many as the registers hold without spilling
  static constexpr int kRows = 16 * kRowTiles * kWarps / kParts;
  static constexpr int kKeys = kWide ? 32 / kParts : 64;  // per step; so wide heads stay within 99 KB (sm_86, sm_89)
  static constexpr int kChunks = kHeadDim / 8;            // 16-byte chunks per row
  // ldmatrix reads 8 rows at once; they hit 8 different bank groups because chunks are permuted by an XOR with the row,
  // or, where a row is not a multiple of 128 bytes, because rows are padded by 16 bytes.
  static constexpr bool kSwizzle = kHeadDim % 64 == 0;
  // Threads that load one row together: a power of two that divides kChunks, at most a 128-byte line.
  static constexpr int kThreadsPerRow = kChunks % 8 == 0 ? 8 : kChunks % 4 == 0 ? 4 : 2;
  static constexpr int kRowBytes = kHeadDim * 2 + (kSwizzle ? 0 : 16);  // from one row to the next
  static constexpr int kKeyChunkBytes = kThreadsPerRow * 16;            // from one key chunk of a thread to its next
  static constexpr int kQueryBytes = kRows * kRowBytes;
  static constexpr int kKeyBytes = kKeys * kRowBytes;               // one K or V buffer
  static constexpr int kSharedBytes = kQueryBytes + 4 * kKeyBytes;  // Q, then two stages of K and V
  static constexpr int kAlignment = 128;

  using Scores = float[kRowTiles][kKeys / 8][4];
  using Output = float[kRowTiles][kPartDim / 8][4];

  // Byte offset of a 16-byte chunk in a tile.
  static __device__ __forceinline__ int query_offset(int row, int chunk) {
    return row * kRowBytes + ((kSwizzle ? chunk ^ (row & 7) : chunk) << 4);
  }
  static __device__ __forceinline__ int key_offset(int row, int chunk) { return query_offset(row, chunk); }

  // Between the arrival of a tile by cp.async and the barrier behind which it is multiplied.
  static __device__ __forceinline__ void publish() {}

  // Behind it no warp reads the queries of this one.
  static __device__ __forceinline__ void release_queries() {
    if constexpr (kParts == 1) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }

  // scores = q . k for the warp's rows.
  static __device__ __forceinline__ void multiply_queries(Scores& scores, uint32_t q_tile, uint32_t k_tile) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) scores[m][n][e] = 0.0f;
      }
    }
    const int warp = threadIdx.x / 32 % (kWarps / kParts), lane = threadIdx.x % 32;
    const uint32_t q_warp = q_tile + warp * kRowTiles * 16 * kRowBytes;
    const int q_lane = query_offset(lane % 16, lane / 16);
    const int k_lane = key_offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
      uint32_t q[kRowTiles][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) ldmatrix_x4(q[m], q_warp + m * 16 * kRowBytes + advance(q_lane, step));
#pragma unroll
      for (int n = 0; n < kKeys / 16; ++n) {
        uint32_t k[4];
        ldmatrix_x4(k, k_tile + n * 16 * kRowBytes + advance(k_lane, step));
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          mma_m16n8k16<T>(scores[m][2 * n], q[m], k[0], k[1]);
          mma_m16n8k16<T>(scores[m][2 * n + 1], q[m], k[2], k[3]);
        }
      }
    }
  }

  // out += weights . v.
  static __device__ __forceinline__ void multiply_values(Output& out, const Scores& weights, uint32_t v_tile) {
    const int lane = threadIdx.x % 32;
    const int v_lane = key_offset(lane % 16, lane / 16);
    const uint32_t v_part = v_tile + threadIdx.x / (kThreads / kParts) * kPartDim * 2;
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step) {
      uint32_t w[kRowTiles][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) pack_weights<T>(w[m], weights[m], step);
#pragma unroll
      for (int n = 0; n < kPartDim / 16; ++n) {
        uint32_t v[4];
        ldmatrix_x4_trans(v, v_part + step * 16 * kRowBytes + advance(v_lane, n));
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          mma_m16n8k16<T>(out[m][2 * n], w[m], v[0], v[1]);
          mma_m16n8k16<T>(out[m][2 * n + 1], w[m], v[2], v[3]);
        }
      }
    }
  }

 private:
  // key_offset(row, chunk + 2 * step) from key_offset(row, chunk), for chunk 0 or 1.
  static __device__ __forceinline__ int advance(int chunk_offset, int step) {
    return kSwizzle ? chunk_offset ^ (step << 5) : chunk_offset + (step << 5);
  }
};

}  // namespace zigzag::prefill
