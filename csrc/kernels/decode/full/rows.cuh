// Several new tokens over a full cache: all query rows of a KV head, 16 and more, share one read of its keys. Here is
// what a block of rows_pipeline.cuh is, and how the parts of a team are merged; tile, masks and products are those of
// the prefill kernel's warpgroups.
//
//   up to 64 rows    both warpgroups of a block serve all of them, each over every second tile of 64 keys
//   up to 128        each serves 64 of them, over the same keys
//   more             by several row tiles of 128, which read the same keys at the same time
#pragma once

#include "core/dispatch.h"
#include "cuda/bulk_copy.cuh"
#include "cuda/launch.h"
#include "kernels/decode/full/workspace.h"
#include "kernels/decode/new_tokens.cuh"
#include "kernels/decode/plan.h"
#include "kernels/decode/state.cuh"
#include "kernels/prefill/prefill.cuh"
#include "kernels/prefill/wgmma_block.cuh"

namespace zigzag::decode_full {

using namespace attend;

template <class T, int kHeadDim, int kRowGroups>
struct RowsBlock : prefill::WgmmaBlock<T, kHeadDim, kRowGroups> {
  using Base = prefill::WgmmaBlock<T, kHeadDim, kRowGroups>;
  static constexpr int kKeyGroups = 2 / kRowGroups;       // warpgroups over the same rows
  static constexpr int kTileBytes = 2 * Base::kKeyBytes;  // K and V of a warpgroup
  static constexpr int kQuads = kHeadDim / 4;
  // Partial results of the block, in the place of the stages: [key groups][rows][kPartialQuads] float4, then the norms.
  static constexpr int kPartialQuads = kQuads + 1;  // rows on different banks
  static constexpr int kNorms = Base::kQueryBytes + kKeyGroups * Base::kRows * kPartialQuads * 16;
  // All threads that own rows.
  static __device__ __forceinline__ void meet() { cuda::named_barrier_sync(6, Base::kThreads); }
};

// Quad `quad` of a row of a tile of keys or queries, from the row's offset function.
template <class Offset>
__device__ __forceinline__ uint2* tile_quad(unsigned char* tile, const Offset& offset, int row, int quad) {
  return reinterpret_cast<uint2*>(tile + offset(row, quad / 2) + quad % 2 * 8);
}

// Leaves the warp's rows in shared memory, for the blocks of the cluster.
template <class Block>
__device__ __forceinline__ void store_rows(const prefill::PrefillState<Block>& state, unsigned char* shared) {
  const int lane = threadIdx.x % 32, first = threadIdx.x / 128 % Block::kKeyGroups * Block::kRows;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first + prefill::lane_row<Block>(0, half);
    float sum = state.sum[0][half];
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    const float top = fmaxf(state.top[0][half], kEmptyMax);
    if (lane % 4 == 0) reinterpret_cast<float2*>(shared + Block::kNorms)[row] = make_float2(top, sum);
    float* out = reinterpret_cast<float*>(shared + Block::kQueryBytes) + row * Block::kPartialQuads * 4;
#pragma unroll
    for (int n = 0; n < Block::kHeadDim / 8; ++n) {
      const float* pair = &state.out[0][n][half * 2];
      *reinterpret_cast<float2*>(out + n * 8 + lane % 4 * 2) = make_float2(pair[0], pair[1]);
    }
  }
}

template <class Block>
__device__ __forceinline__ void write_row(const Params& p, const prefill::QueryTile& tile, int row, int quad,
                                          const Partial& result) {
  using T = typename Block::Element;
  const int column = tile.column(row), head = tile.head(row);
  const bool empty = result.norm.y == 0.f || column < tile.pad;
  const float factor = empty ? 0.f : cuda::reciprocal_approx(result.norm.y);
  const float4 out = empty ? make_float4(0.f, 0.f, 0.f, 0.f) : result.out;
  const int64_t at = tile.batch * p.out_stride.batch + head * p.out_stride.head + column * p.out_stride.token;
  *reinterpret_cast<uint2*>(static_cast<char*>(p.out) + 2 * at + 8 * quad) =
      make_uint2(cuda::pack2<T>(out.x * factor, out.y * factor), cuda::pack2<T>(out.z * factor, out.w * factor));
  if (quad != 0) return;
  p.lse[(static_cast<int64_t>(tile.batch) * p.lse_heads(p.group) + head) * p.q_len + column] =
      empty ? -INFINITY : log_sum_exp(result.norm);
}

// Every block of the cluster merges every cluster-th row of what all of them have; of several clusters the one that
// comes last merges what they have left in the workspace.
template <class Block>
__device__ __forceinline__ void merge_rows(const Params& p, const prefill::QueryTile& tile, uint32_t base, int rows) {
  constexpr int kQuads = Block::kQuads;
  const uint32_t parts = base + Block::kQueryBytes, norms = base + Block::kNorms;
  const int rank = cuda::cluster_rank(), mask = p.cluster() - 1, sources = Block::kKeyGroups << p.cluster_log2;
  const int items = rank < rows ? ((rows - rank + mask) >> p.cluster_log2) * kQuads : 0;
  const int group = blockIdx.z * gridDim.y + blockIdx.y, groups = gridDim.y * gridDim.z;
  float4* shared_out = reinterpret_cast<float4*>(static_cast<char*>(p.workspace) + kCounterBytes);
  float2* shared_norm = reinterpret_cast<float2*>(shared_out + groups * Block::kRows * p.spread * kQuads);
  const auto place = [&](int row, int cluster) { return (group * Block::kRows + row) * p.spread + cluster; };

  for (int i = threadIdx.x; i < items; i += Block::kThreads) {
    const int row = rank + (i / kQuads << p.cluster_log2), quad = i % kQuads;
    const auto source = [&](int k) { return (k >> p.cluster_log2) * Block::kRows + row; };
    const Partial part = merge_partials<false, 8 * Block::kKeyGroups>(  // of clusters of 8: all under way together
        sources,
        [&](int k) {
          const uint32_t at = parts + (source(k) * Block::kPartialQuads + quad) * 16;
          return cuda::cluster_load4(cuda::cluster_address(at, k & mask));
        },
        [&](int k) { return cuda::cluster_load2(cuda::cluster_address(norms + source(k) * 8, k & mask)); });
    if (p.spread == 1) {
      write_row<Block>(p, tile, row, quad, part);
    } else {
      const int at = place(row, blockIdx.x >> p.cluster_log2);
      __stcg(shared_out + at * kQuads + quad, part.out);
      if (quad == 0) __stcg(shared_norm + at, part.norm);
    }
  }
  __syncwarp();
  cuda::cluster_arrive_relaxed();  // the other blocks' memory is no longer needed: what it held has been used
  if (p.spread > 1) {
    __shared__ bool is_last;
    Block::meet();
    if (threadIdx.x == 0) {  // its release covers what the barrier has shown it of the other threads' writes
      const unsigned others = p.spread - 1;
      unsigned* counter = static_cast<unsigned*>(p.workspace) + (group << p.cluster_log2) + rank;
      is_last = cuda::atomic_inc_acq_rel(counter, others) == others;
    }
    Block::meet();
    for (int i = threadIdx.x; is_last && i < items; i += Block::kThreads) {
      const int row = rank + (i / kQuads << p.cluster_log2), quad = i % kQuads;
      write_row<Block>(p, tile, row, quad,
                       merge_partials<false, 8>(
                           p.spread, [&](int k) { return __ldcg(shared_out + place(row, k) * kQuads + quad); },
                           [&](int k) { return __ldcg(shared_norm + place(row, k)); }));
    }
    __syncwarp();
  }
  cuda::cluster_wait();
}

inline cuda::LaunchConfig rows_config(const DecodePlan& plan, int threads) {
  cuda::LaunchConfig config = {};
  config.grid = dim3(static_cast<unsigned>(plan.grid[0]), static_cast<unsigned>(plan.grid[1]),
                     static_cast<unsigned>(plan.grid[2]));
  config.block = dim3(static_cast<unsigned>(threads));
  config.shared_bytes = plan.layout.total;
  config.cluster = plan.cluster;
  return config;
}

template <class Block, class KernelParams>
DecodePlan plan_rows_launch(const DecodeRequest& request, void (*kernel)(KernelParams), int threads) {
  return plan_rows(
      request, Block::kRows, Block::kSharedBytes, cuda::device_facts(), cuda::launch_options(),
      [&](const DecodePlan& plan) { return cuda::max_active_clusters(kernel, rows_config(plan, threads)); });
}

inline Params rows_params(const AttentionParams& a, const DecodeRequest& request, const DecodePlan& plan) {
  return {{a, false, false}, plan.layout, request.group, plan.row_blocks, plan.team, cuda::floor_log2(plan.cluster),
          plan.spread};
}

}  // namespace zigzag::decode_full
