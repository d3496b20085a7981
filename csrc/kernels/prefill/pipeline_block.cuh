// Sizes, shared memory and matrix products of the pipeline kernel.
#pragma once

#include "cuda/bulk_copy.cuh"
#include "cuda/wgmma.cuh"
#include "kernels/prefill/fragments.cuh"
#include "kernels/prefill/pipeline_plan.h"
#include "kernels/prefill/swizzle.h"

namespace zigzag::prefill {
using namespace cuda;  // PTX wrappers and the launch helper

// T: element of queries, plain keys and values, and outputs. Operand_: of the products. kStages_: steps of keys and
// values that are there or under way.
template <class T, class Operand_, int kHeadDim_, int kStages_>
struct PipelineBlock {
  static_assert(kHeadDim_ == 64 || kHeadDim_ == 128);
  using Element = T;
  using Operand = Operand_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kRowTiles = 1;
  static constexpr int kParts = 1, kPartDim = kHeadDim;  // as of MmaBlock
  static constexpr int kThreads = 256;                   // that own rows: two warpgroups of 64 each
  static constexpr int kProducers = 128;                 // of the third warpgroup, which brings keys and values
  static constexpr int kBlockThreads = kThreads + kProducers;
  static constexpr int kRows = kPipelineRows;
  static constexpr int kKeys = kPipelineKeys;
  static constexpr int kChunks = kHeadDim / 8;
  static constexpr int kThreadsPerRow = 8;
  static constexpr int kRowBytes = kSwizzledRowBytes;
  static constexpr int kKeyChunkBytes = kKeys * kRowBytes;  // a box: all keys by 64 dims
  static constexpr int kQueryBytes = kRows * kHeadDim * 2;
  static constexpr int kKeyBytes = kKeys * kHeadDim * 2;
  static constexpr int kStageBytes = 2 * kKeyBytes;  // K, then V
  static constexpr int kStages = kStages_;
  static constexpr int kStagesEnd = kQueryBytes + kStages * kStageBytes;
  static constexpr int kAlignment = 1024;  // of a period of the swizzle

  using Scores = float[kRowTiles][kKeys / 8][4];
  using Output = float[kRowTiles][kHeadDim / 8][4];
  using Weights = uint32_t[kKeys / 16][4];  // A fragments

  static __device__ __forceinline__ int query_offset(int row, int chunk) { return swizzled_piece(kRows, row, chunk); }
  static __device__ __forceinline__ int key_offset(int row, int chunk) { return swizzled_piece(kKeys, row, chunk); }

  // Behind it no warp reads the queries of this one.
  static __device__ __forceinline__ void release_queries() { warpgroup_barrier(); }

  // Starts scores = q . k for the warpgroup's 64 rows.
  static __device__ __forceinline__ void start_scores(Scores& scores, uint32_t q_tile, uint32_t k_tile) {
    uint32_t q_group = q_tile + threadIdx.x / 128 * 64 * kRowBytes;
    asm volatile("" : "+r"(q_group));  // or its descriptors would be kept from step to step, in 16 registers
    hold_accumulators(scores[0]);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
      const int block = step / 4, bytes = step % 4 * 32;
      wgmma_m64n128k16<Operand>(scores[0], swizzled_operand(q_group + block * kRows * kRowBytes + bytes),
                                swizzled_operand(k_tile + block * kKeyChunkBytes + bytes), step > 0);
    }
    wgmma_commit();
    hold_accumulators(scores[0]);
  }

  // Starts out += weights . v.
  static __device__ __forceinline__ void start_values(Output& out, Weights& weights, uint32_t v_tile) {
    hold_accumulators(out[0]);
    hold_fragments(weights);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step) {
      const uint64_t values = swizzled_operand(v_tile + step * 16 * kRowBytes, kKeyChunkBytes);
      if constexpr (kHeadDim == 128) {
        wgmma_m64n128k16<Operand>(out[0], weights[step], values);
      } else {
        wgmma_m64n64k16<Operand>(out[0], weights[step], values);
      }
    }
    wgmma_commit();
    hold_accumulators(out[0]);
  }

  static __device__ __forceinline__ void pack(Weights& weights, const Scores& scores) {
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step) pack_weights<Operand>(weights[step], scores[0], step);
  }
};

// The barriers of the stages: each of K and V is filled by the producers and emptied by the warps that own rows.
template <int kStages>
struct PipelineBarriers {
  uint64_t k_full[kStages], v_full[kStages], k_empty[kStages], v_empty[kStages];

  // By one thread. A full stage is one arrival and the bytes that it announces.
  __device__ __forceinline__ void init(int warps) {
#pragma unroll
    for (int i = 0; i < kStages; ++i) {
      barrier_init(shared_address(&k_full[i]), 1);
      barrier_init(shared_address(&v_full[i]), 1);
      barrier_init(shared_address(&k_empty[i]), warps);
      barrier_init(shared_address(&v_empty[i]), warps);
    }
    barrier_init_fence();
  }
};

// A stage and the parity of the phase in which it is filled.
template <int kStages>
struct StageCursor {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

}  // namespace zigzag::prefill
