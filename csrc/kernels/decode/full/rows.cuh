// Several new tokens over a full cache: all query rows of a KV head, 16 and more, share one read of its keys. The tile,
// the masks and the products are those of the prefill kernel's warpgroups; what is added here is what makes it a decode
// kernel: the keys of a head are shared out over the blocks of a team, whose parts are merged as in plan.h, and the new
// tokens are turned and appended by the way.
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
  static constexpr int kKeyGroups = 2 / kRowGroups;  // warpgroups over the same rows
  static constexpr int kStepKeys = Base::kKeys * kKeyGroups;
  static constexpr int kTileBytes = 2 * Base::kKeyBytes;  // K and V of a warpgroup
  static constexpr int kStageBytes = kKeyGroups * kTileBytes;
  static constexpr int kFit = (kMaxSharedBytes - 1024 - Base::kQueryBytes) / kStageBytes;
  static constexpr int kStages = kFit < 6 ? kFit : 6;  // all but one under way: 128 to 160 KB
  static constexpr int kSharedBytes = Base::kQueryBytes + kStages * kStageBytes;
  static constexpr int kQuads = kHeadDim / 4;
  // Partial results of the block, in the place of the stages: [key groups][rows][kPartialQuads] float4, then the norms.
  static constexpr int kPartialQuads = kQuads + 1;  // rows on different banks
  static constexpr int kNorms = Base::kQueryBytes + kKeyGroups * Base::kRows * kPartialQuads * 16;
  // All threads that own rows.
  static __device__ __forceinline__ void meet() { cuda::named_barrier_sync(6, Base::kThreads); }
  static_assert(kStages >= 2 && kNorms + kKeyGroups * Base::kRows * 8 <= kSharedBytes);
};

// Quad `quad` of a row of a tile of keys or queries, from the row's offset function.
template <class Offset>
__device__ __forceinline__ uint2* tile_quad(unsigned char* tile, const Offset& offset, int row, int quad) {
  return reinterpret_cast<uint2*>(tile + offset(row, quad / 2) + quad % 2 * 8);
}

// Query rows on their way through RoPE to their tile. Rows of padding, and past the last, become zeros.
template <class Block>
__device__ __forceinline__ void load_rotated_queries(const Params& p, const prefill::QueryTile& tile,
                                                     unsigned char* q_tile) {
  using T = typename Block::Element;
  const int turning = turning_pairs(p);
#pragma unroll 1
  for (int i = threadIdx.x; i < Block::kRows * Block::kChunks; i += Block::kThreads) {
    const int row = i / Block::kChunks, pair = i % Block::kChunks, column = tile.column(row);
    const QuadPair quads = quads_of(pair, turning);
    uint4 x = make_uint4(0, 0, 0, 0);
    if (column >= tile.pad && column < p.q_len) {
      const int64_t source =
          tile.batch * p.q_stride.batch + tile.head(row) * p.q_stride.head + column * p.q_stride.token;
      x = load_pair(static_cast<const char*>(p.q) + 2 * source, quads);
      if (pair < turning) {
        Turn<T> turn;
        turn.load(p, tile.batch, column, quads);
        x = turn.apply(p, x);
      }
    }
    *tile_quad(q_tile, Block::query_offset, row, quads.low) = make_uint2(x.x, x.y);
    *tile_quad(q_tile, Block::query_offset, row, quads.high) = make_uint2(x.z, x.w);
  }
}

// Turns the new keys among those of a step, from key `number` on, in their stage.
template <class Block>
__device__ __forceinline__ void rotate_new_keys(const Params& p, const prefill::QueryTile& tile, int number,
                                                unsigned char* stage) {
  using T = typename Block::Element;
  const int turning = turning_pairs(p);
#pragma unroll 1
  for (int i = threadIdx.x; i < Block::kStepKeys * Block::kChunks; i += Block::kThreads) {
    const int key = i / Block::kChunks, pair = i % Block::kChunks;
    if (number + key >= tile.keys.count || pair >= turning) continue;
    const int token = tile.keys.position(number + key) - tile.length;
    if (token < 0) continue;
    const QuadPair quads = quads_of(pair, turning);
    Turn<T> turn;
    turn.load(p, tile.batch, tile.pad + token, quads);
    unsigned char* keys = stage + key / Block::kKeys * Block::kTileBytes;
    uint2* low = tile_quad(keys, Block::key_offset, key % Block::kKeys, quads.low);
    uint2* high = tile_quad(keys, Block::key_offset, key % Block::kKeys, quads.high);
    const uint4 x = turn.apply(p, make_uint4(low->x, low->y, high->x, high->y));
    *low = make_uint2(x.x, x.y), *high = make_uint2(x.z, x.w);
  }
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

// Grid: (team, KV heads x row tiles, batch).
template <class Block>
__global__ void __launch_bounds__(Block::kThreads, 1) decode_rows_kernel(const __grid_constant__ Params p) {
  using T = typename Block::Element;
  extern __shared__ __align__(Block::kAlignment) unsigned char shared[];
  const uint32_t q_tile = cuda::shared_address(shared), stages = q_tile + Block::kQueryBytes;
  const int kv_head = blockIdx.y / p.row_blocks, row_tile = blockIdx.y % p.row_blocks;
  cuda::grid_dependency_wait();
  cuda::grid_dependency_launch();
  __shared__ prefill::QueryTile tile;
  if (threadIdx.x == 0) {
    tile = prefill::QueryTile::of(p, blockIdx.z, kv_head, row_tile * Block::kRows, Block::kRows);
  }
  __syncthreads();
  const RingLayout layout{p.sink, p.window, p.slots};
  // As in the prefill kernel.
  const float scale = fmaxf(fabsf(p.scale) * kLog2e, 1e-30f);
  const bool rotate = turning_pairs(p) > 0;

  // The new tokens are asked for before the tiles: behind those, which saturate the memory, they would come last.
  using S = Shape<T, Block::kHeadDim, 2, false, false>;
  const bool appends = blockIdx.x == gridDim.x - 1 && row_tile == 0;
  Keys keys = {};
  NewTokens<S> tokens;
  if (appends) {
    keys = locate_keys<S>(p, blockIdx.z, kv_head);
    settle_keys<S>(p, keys);
    tokens.load(p, keys, 0, keys.fresh, threadIdx.x);
  }

  const int64_t steps = (tile.keys.count + Block::kStepKeys - 1) / Block::kStepKeys;
  const int begin = static_cast<int>(steps * blockIdx.x / gridDim.x);
  const int end = static_cast<int>(steps * (blockIdx.x + 1) / gridDim.x);
  const auto load = [&](int step, int stage) {
    if (step < end) {
#pragma unroll
      for (int i = 0; i < Block::kKeyGroups; ++i) {
        prefill::load_keys<Block>(layout, tile, step * Block::kStepKeys + i * Block::kKeys,
                                  stages + stage * Block::kStageBytes + i * Block::kTileBytes);
      }
    }
    cuda::cp_async_commit();
  };
  if (!rotate) prefill::load_queries<Block>(p, tile, q_tile);  // travel with the first tile
  for (int i = 0; i < Block::kStages - 1; ++i) load(begin + i, i);
  if (rotate) load_rotated_queries<Block>(p, tile, shared);
  if (appends) tokens.append(p, keys, Block::kThreads);

  prefill::PrefillState<Block> state = {};
  state.top[0][0] = state.top[0][1] = -INFINITY;
  const int key_group = threadIdx.x / 128 % Block::kKeyGroups;
  int stage = 0;
  for (int step = begin; step < end; ++step) {
    // This thread's part of the step has arrived, then everyone's; and nobody reads the stage before it any more.
    cuda::cp_async_wait<Block::kStages - 2>();
    Block::publish();
    __syncthreads();
    load(step + Block::kStages - 1, (stage == 0 ? Block::kStages : stage) - 1);
    const int number = step * Block::kStepKeys;
    if (rotate && number + Block::kStepKeys > tile.length - tile.keys.first) {
      rotate_new_keys<Block>(p, tile, number, shared + Block::kQueryBytes + stage * Block::kStageBytes);
      Block::publish();
      __syncthreads();
    }
    const int first = number + key_group * Block::kKeys;
    const uint32_t k_tile = stages + stage * Block::kStageBytes + key_group * Block::kTileBytes;
    typename Block::Scores scores;
    Block::multiply_queries(scores, q_tile, k_tile);
    if (p.scale < 0.0f) prefill::negate(scores);
    if (!tile.keys.all_visible(first, Block::kKeys)) prefill::mask_scores<Block>(scores, tile, first);
    prefill::update_softmax<Block>(state, scores, scale);
    Block::multiply_values(state.out, scores, k_tile + Block::kKeyBytes);
    stage = stage + 1 == Block::kStages ? 0 : stage + 1;
  }
  cuda::cp_async_wait<0>();
  __syncthreads();
  store_rows<Block>(state, shared);
  __syncwarp();
  cuda::cluster_arrive();
  cuda::cluster_wait();
  merge_rows<Block>(p, tile, q_tile, min(Block::kRows, p.group * p.q_len - row_tile * Block::kRows));
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

template <class Block>
bool launch_rows_block(const AttentionParams& a, void* stream) {
  const DecodeRequest request = decode_request(a);
  const DecodePlan plan = plan_rows_launch<Block>(request, decode_rows_kernel<Block>, Block::kThreads);
  if (plan.cluster == 1) return false;
  cuda::LaunchConfig config = rows_config(plan, Block::kThreads);
  config.dependent_launch = cuda::launch_options().dependent_launch;
  cuda::launch(decode_rows_kernel<Block>, config, rows_params(a, request, plan), stream);
  return true;
}

}  // namespace zigzag::decode_full
