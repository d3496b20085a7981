// Which kernel takes a chunk of more than kMaxDecodeQueries tokens, and over how many blocks the keys of one tile of
// query rows spread: a pure function of the shape and of what is known of the device, without CUDA.
//
//   tiles      prefill.cuh: every GPU, full caches and rings, plain caches; loads, products and softmax take turns
//   pipeline   pipeline.cuh: sm_90a, full caches, head_dim 64 and 128, also over codes; they overlap
//
// What the pipeline cannot be faster than, for q_len tokens on kv_len keys, head_dim d, 32/8 heads on an H200 whose
// matrix units give other kernels 650 to 750 TFLOP/s at these shapes, and whose memory is read at 4.6 TB/s:
//
//   products   4 d num_q_heads q_len kv_len FLOP    512 tokens on 32K keys: 0.27 TFLOP, 370 to 420 us; 1,024: 740 to
//   850 reads      4 d num_kv_heads kv_len bytes        134 MB, 29 us: what counts below 64 tokens from L2    4 d
//   kv_len bytes per tile of rows    a tile of 128 rows reads 512 bytes for 65,536 FLOP: at 700 TFLOP/s
//                                                   5.5 TB/s, close to what L2 gives; smaller tiles would be bound by
//                                                   it
//
// 512 tokens of 32/8 heads are 128 tiles of 128 rows (heads of a group share a tile, so that a tile reads keys once for
// all of them): one for nearly every one of 132 SMs. Fewer tokens would leave SMs idle, so that there the keys of a
// tile are spread over several blocks, whose parts a second launch merges.
#pragma once

#include <cstdint>

#include "core/params.h"
#include "cuda/device_facts.h"

namespace zigzag::prefill {

inline constexpr int kPipelineRows = 128;  // query rows of a tile: two warpgroups of 64
inline constexpr int kPipelineKeys = 128;  // keys of a step

enum class PrefillKernel { kTiles, kPipeline };

constexpr const char* name(PrefillKernel kernel) { return kernel == PrefillKernel::kTiles ? "tiles" : "pipeline"; }

struct PrefillRequest {
  int batch, num_kv_heads, group, q_len, head_dim;
  int slots, window;  // as in AttentionParams
  KvFormats formats;

  static PrefillRequest of(const AttentionParams& p) {
    return {p.batch, p.num_kv_heads, p.num_q_heads / p.num_kv_heads,      p.q_len, p.head_dim,
            p.slots, p.window,       {p.k_store.format, p.v_store.format}};
  }
};

struct PrefillPlan {
  PrefillKernel kernel = PrefillKernel::kTiles;
  // Of the pipeline:
  int64_t tiles = 0;  // of query rows, over all rows of the batch and KV heads
  int splits = 1;     // blocks that share the keys of a tile
};

// Bytes of what one block leaves in the workspace where splits > 1: [rows][head_dim] fp32 and {max, sum} per row.
constexpr int64_t pipeline_part_bytes(int head_dim) { return kPipelineRows * (head_dim + 2) * int64_t{4}; }

// Overrides that the GPU or the shape has no place for count as none. `scratch_bytes`: of the workspace.
PrefillPlan plan_prefill(const PrefillRequest& request, const cuda::DeviceFacts& device,
                         const cuda::LaunchOptions& options, int64_t scratch_bytes);

}  // namespace zigzag::prefill
