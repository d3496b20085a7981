// Results of blocks that share the keys of a tile of query rows: left in the workspace, merged by a launch of its own.
// (A last block that merges would read what all others have, of 16 splits a megabyte by one SM; the launch spreads it
// over the GPU.) Workspace, behind the counters of decode_full, which stay zero: [tiles][splits][rows][head_dim] fp32,
// then {max, sum} [tiles][splits][rows].
#pragma once

#include "cuda/launch.h"
#include "kernels/decode/full/workspace.h"
#include "kernels/decode/state.cuh"
#include "kernels/prefill/pipeline_plan.h"
#include "kernels/prefill/prefill.cuh"

namespace zigzag::prefill {

struct PartsLayout {
  float* out;
  float2* norm;
  int64_t splits;

  __device__ __forceinline__ PartsLayout(void* workspace, int64_t tiles, int splits, int head_dim)
      : out(reinterpret_cast<float*>(static_cast<char*>(workspace) + decode_full::kCounterBytes)),
        norm(reinterpret_cast<float2*>(out + tiles * splits * kPipelineRows * head_dim)),
        splits(splits) {}

  // Number of a row of a split of a tile.
  __device__ __forceinline__ int64_t row(int64_t tile, int split, int row) const {
    return (tile * splits + split) * kPipelineRows + row;
  }
};

// This warp's rows of the block's tile and split.
template <class Block>
__device__ __forceinline__ void store_part(void* workspace, const PrefillState<Block>& state) {
  const PartsLayout parts(workspace, gridDim.x, gridDim.y, Block::kHeadDim);
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t row = parts.row(blockIdx.x, blockIdx.y, lane_row<Block>(0, half));
    float sum = state.sum[0][half];
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    if (lane % 4 == 0) __stcg(parts.norm + row, make_float2(fmaxf(state.top[0][half], attend::kEmptyMax), sum));
    float* out = parts.out + row * Block::kHeadDim + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < Block::kHeadDim / 8; ++n) {
      const float* pair = &state.out[0][n][half * 2];
      __stcg(reinterpret_cast<float2*>(out + n * 8), make_float2(pair[0], pair[1]));
    }
  }
}

struct PartsParams : AttentionParams {
  int tiles, splits;
};

inline constexpr int kPartsThreads = 256;

// Four dims of a row, whose parts are merged in the order of the keys.
template <class T>
__device__ __forceinline__ void write_merged(const PartsParams& p, const QueryTile& tile, int row, int quad,
                                             const attend::Partial& merged) {
  const int column = tile.column(row), head = tile.head(row);
  float top = merged.norm.x, sum = merged.norm.y, weight = 1.0f;
  if (p.sink_logits != nullptr && sum != 0.0f) {
    const float logit = attend::kLog2e * __ldg(p.sink_logits + head), high = fmaxf(top, logit);
    weight = exp2_approx(top - high);
    sum = sum * weight + exp2_approx(logit - high);
    top = high;
  }
  const bool empty = sum == 0.0f || column < tile.pad;
  const float factor = empty ? 0.0f : weight / sum;
  const float4 out = empty ? make_float4(0.0f, 0.0f, 0.0f, 0.0f) : merged.out;
  const int64_t at = tile.batch * p.out_stride.batch + head * p.out_stride.head + column * p.out_stride.token;
  *reinterpret_cast<uint2*>(static_cast<T*>(p.out) + at + 4 * quad) =
      make_uint2(pack2<T>(out.x * factor, out.y * factor), pack2<T>(out.z * factor, out.w * factor));
  if (quad != 0) return;
  p.lse[(static_cast<int64_t>(tile.batch) * p.lse_heads(tile.group) + head) * p.q_len + column] =
      empty ? -INFINITY : (top + log2f(sum)) * attend::kLn2;
}

// Grid: tiles x rows x head_dim / 4, a thread for four dims of a row; a block stays within a tile. kCodes: whether sums
// may span more than a float factor does (attend::Decay).
template <class T, bool kCodes>
__global__ void __launch_bounds__(kPartsThreads) merge_parts_kernel(const __grid_constant__ PartsParams p) {
  const int quads = p.head_dim / 4, rows = kPartsThreads / quads, blocks = kPipelineRows / rows;
  const int tile_number = blockIdx.x / blocks, quad = threadIdx.x % quads;
  const int row = blockIdx.x % blocks * rows + threadIdx.x / quads;
  const QueryTile tile = QueryTile::of_block(p, kPipelineRows, tile_number);
  if (tile.column(row) >= p.q_len) return;
  const PartsLayout parts(p.workspace, p.tiles, p.splits, p.head_dim);
  write_merged<T>(p, tile, row, quad,
                  attend::merge_partials<kCodes, 8>(
                      p.splits,
                      [&](int i) {
                        const int64_t at = parts.row(tile_number, i, row) * quads + quad;
                        return __ldcg(reinterpret_cast<const float4*>(parts.out) + at);
                      },
                      [&](int i) { return __ldcg(parts.norm + parts.row(tile_number, i, row)); }));
}

template <class T, bool kCodes>
void launch_merge_parts(const AttentionParams& p, const PrefillPlan& plan, void* stream) {
  if (plan.splits == 1) return;
  const PartsParams params = {p, static_cast<int>(plan.tiles), plan.splits};
  LaunchConfig config;
  config.grid = dim3(static_cast<unsigned>(plan.tiles * kPipelineRows * (p.head_dim / 4) / kPartsThreads));
  config.block = dim3(kPartsThreads);
  launch(merge_parts_kernel<T, kCodes>, config, params, stream);
}

}  // namespace zigzag::prefill
