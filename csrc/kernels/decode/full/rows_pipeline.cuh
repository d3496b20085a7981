// The kernel of many query rows (rows.cuh), whose warpgroups have tasks of their own: one brings keys and values, as
// boxes by the tensor copy engine, two multiply and weigh. A warpgroup starts S = Q K^T of a tile and O += P V of the
// tile before it together, and weighs S while the values are multiplied; nobody waits for the other warpgroup. (Loads,
// products and softmax in turns, all warps in step, took 1.8 to 2.2 us for a tile of each warpgroup, where the memory
// brings one in 1.8 and the products take 0.6.)
//
// Tile t of 64 keys belongs to worker t mod workers: the first tile of each is the same whatever the length, and is
// asked for before that is known, where there is memory (readable_slots). One that turns out not to lie in the cache as
// a whole is passed over, and its keys come again, row by row with zeros behind the last key.
//
//   up to 64 rows    a worker is a warpgroup, with half of the block's stages
//   up to 128        a worker is a block, whose warpgroups serve 64 rows each
#pragma once

#include <algorithm>

#include "kernels/attention.h"
#include "kernels/decode/full/rows_bring.cuh"

namespace zigzag::decode_full {

// A warpgroup that owns rows: its way through the tiles of its worker.
template <class Block, class Barriers>
struct RowOwner {
  prefill::PrefillState<Block>& state;
  const prefill::QueryTile& tile;
  Barriers& barriers;
  float scale;
  uint32_t q_tile, stages;
  typename Block::Weights weights;
  prefill::StageCursor<Block::kStages> k, v;

  __device__ __forceinline__ uint32_t stage_of(int stage) const { return stages + stage * Block::kTileBytes; }
  __device__ __forceinline__ void wait_for_keys() const {
    cuda::barrier_wait(cuda::shared_address(&barriers.k_full[k.stage]), k.parity);
  }
  __device__ __forceinline__ void wait_for_values() const {
    cuda::barrier_wait(cuda::shared_address(&barriers.v_full[v.stage]), v.parity);
  }

  // One arrival a warp: all lanes are behind the wait for its products.
  __device__ __forceinline__ static void release(uint64_t& empty, bool always = true) {
    if (threadIdx.x % 32 == 0 && always) cuda::barrier_arrive(cuda::shared_address(&empty));
  }

  // Weighs the scores of a tile, then gives its keys back. Sums are never negative, which the compiler does not know:
  // it would otherwise leave all of this until the values are multiplied.
  template <bool kMasked>
  __device__ __forceinline__ bool weigh(typename Block::Scores& scores, int at, float (&rescale)[Block::kRowTiles][2]) {
    if constexpr (kMasked) prefill::mask_scores<Block>(scores, tile, at * Block::kKeys);
    const bool changed = prefill::weigh<Block>(state, scores, scale, rescale);
    __syncwarp();
    release(barriers.k_empty[k.stage], state.sum[0][0] != -1.0f && state.sum[0][1] != -1.0f);
    return changed;
  }

  __device__ __forceinline__ void pass_over() {
    wait_for_keys();
    wait_for_values();
    __syncwarp();
    release(barriers.k_empty[k.stage]);
    release(barriers.v_empty[v.stage]);
    k.advance();
    v.advance();
  }

  // The first tile has no values to multiply before it.
  __device__ __forceinline__ void first(int at, bool masked) {
    typename Block::Scores scores;
    float rescale[Block::kRowTiles][2];
    wait_for_keys();
    Block::start_scores(scores, q_tile, stage_of(k.stage));
    cuda::wgmma_wait<0>();
    cuda::hold_accumulators(scores[0]);
    if (masked) {
      weigh<true>(scores, at, rescale);
    } else {
      weigh<false>(scores, at, rescale);
    }
    Block::pack(weights, scores);
    k.advance();
  }

  template <bool kMasked>
  __device__ __forceinline__ void next(int at) {
    typename Block::Scores scores;
    float rescale[Block::kRowTiles][2];
    wait_for_keys();
    Block::start_scores(scores, q_tile, stage_of(k.stage));
    wait_for_values();
    Block::start_values(state.out, weights, stage_of(v.stage) + Block::kKeyBytes);
    cuda::wgmma_wait<1>();  // the scores; the values may still run
    cuda::hold_accumulators(scores[0]);
    const bool changed = weigh<kMasked>(scores, at, rescale);
    cuda::wgmma_wait<0>();
    cuda::hold_accumulators(state.out[0]);
    cuda::hold_fragments(weights);
    release(barriers.v_empty[v.stage]);
    prefill::rescale_output<Block>(state, rescale, changed);
    Block::pack(weights, scores);
    k.advance();
    v.advance();
  }

  __device__ __forceinline__ void finish() {
    wait_for_values();
    Block::start_values(state.out, weights, stage_of(v.stage) + Block::kKeyBytes);
    cuda::wgmma_wait<0>();
    cuda::hold_accumulators(state.out[0]);
  }

  __device__ __forceinline__ void run(const TileWalk& walk) {
    if (walk.wasted) pass_over();
    if (walk.first >= walk.end) return;
    // Every query sees all keys up to the first query's own.
    const int visible = min((tile.keys.first_query + 1 - tile.keys.first) / Block::kKeys, walk.end);
    first(walk.first, walk.first >= visible);
    int at = walk.first + walk.step;
#pragma unroll 1
    for (; at < visible; at += walk.step) next<false>(at);
#pragma unroll 1
    for (; at < walk.end; at += walk.step) next<true>(at);
    finish();
  }
};

// Grid: (team, KV heads x row tiles, batch).
template <class Block>
__global__ void __launch_bounds__(Block::kBlockThreads, 1) rows_pipeline_kernel(const __grid_constant__ RowsParams p) {
  using Barriers = prefill::PipelineBarriers<Block::kStages>;
  extern __shared__ __align__(Block::kAlignment) unsigned char shared[];
  __shared__ prefill::QueryTile tile;
  __shared__ Barriers barriers[Block::kKeyGroups];
  const int kv_head = blockIdx.y / p.row_blocks, row_tile = blockIdx.y - kv_head * p.row_blocks;
  const int first_row = row_tile * Block::kRows;
  unsigned char* stages = shared + Block::kQueryBytes;
  __shared__ uint64_t tile_written;
  const auto wait_for_tile = [&] { cuda::barrier_wait(cuda::shared_address(&tile_written), 0); };
  if (threadIdx.x == Block::kThreads) {
#pragma unroll
    for (int i = 0; i < Block::kKeyGroups; ++i) barriers[i].init(Block::kThreads / 32 / Block::kKeyGroups);
    cuda::barrier_init(cuda::shared_address(&tile_written), 1);
    cuda::barrier_init_fence();
  }
  __syncthreads();
  cuda::grid_dependency_wait();
  cuda::grid_dependency_launch();

  if (threadIdx.x >= Block::kThreads) {
    cuda::give_registers<Block::kProducerRegisters>();
    const int producer = threadIdx.x - Block::kThreads;
    if (producer == 0) {
#pragma unroll
      for (int i = 0; i < Block::kKeyGroups; ++i) {
        const TileWalk walk = TileWalk::begin<Block>(p, i);
        if (!walk.early) continue;
        const uint32_t k_tile = cuda::shared_address(stages) + i * Block::kStages * Block::kTileBytes;
        const int slot = walk.first * Block::kKeys;
        copy_slots<Block>(p.boxes[0], k_tile, slot, kv_head, blockIdx.z, barriers[i].k_full[0]);
        copy_slots<Block>(p.boxes[1], k_tile + Block::kKeyBytes, slot, kv_head, blockIdx.z, barriers[i].v_full[0]);
      }
    } else if (producer == 32) {
      tile = prefill::QueryTile::of(p, blockIdx.z, kv_head, first_row, Block::kRows);
      cuda::barrier_arrive(cuda::shared_address(&tile_written));
    }
    __syncwarp();
    wait_for_tile();
    const int key_group = producer / Block::kGroupProducers;
    TileWalk walk = TileWalk::begin<Block>(p, key_group);
    walk.settle<Block>(tile);
    bring_tiles<Block>(p, tile, walk, barriers[key_group], stages + key_group * Block::kStages * Block::kTileBytes,
                       key_group);
    __syncwarp();
    cuda::cluster_arrive();  // the barriers of the merge, which need all threads
    cuda::cluster_wait();
    cuda::cluster_arrive();
    cuda::cluster_wait();
  } else {
    cuda::take_registers<Block::kRowRegisters>();
    const int key_group = threadIdx.x / 128 % Block::kKeyGroups, head = p.heads(kv_head);
    const uint32_t q_tile = cuda::shared_address(shared);
    {
      using Rows = RowsOnTheWay<Block>;
      Rows rows;
      rows.load(p, head, first_row, 0);
      TokensOnTheWay<Block> tokens;
      const bool appends = blockIdx.x == gridDim.x - 1 && row_tile == 0;
      if (appends) tokens.load(p, head);
      wait_for_tile();
      rows.store(p, tile, 0, shared);
#pragma unroll 1
      for (int item = Rows::kBatch; item < Rows::kItems; item += Rows::kBatch) {
        rows.load(p, head, first_row, item);
        rows.store(p, tile, item, shared);
      }
      Block::publish();
      Block::meet();
      if (appends) tokens.append(p, tile);
    }
    prefill::PrefillState<Block> state = {};
    state.top[0][0] = state.top[0][1] = -INFINITY;
    TileWalk walk = TileWalk::begin<Block>(p, key_group);
    walk.settle<Block>(tile);
    // As in the prefill kernel.
    const float scale = fmaxf(fabsf(p.scale) * kLog2e, 1e-30f);
    RowOwner<Block, Barriers> owner = {
        state, tile,   barriers[key_group],
        scale, q_tile, q_tile + Block::kQueryBytes + key_group * Block::kStages * Block::kTileBytes,
        {},    {},     {}};
    owner.run(walk);
    Block::meet();  // nobody reads a stage any more
    store_rows<Block>(state, shared);
    __syncwarp();
    cuda::cluster_arrive();
    cuda::cluster_wait();
    merge_rows<Block>(p, tile, q_tile, min(Block::kRows, p.group * p.q_len - first_row));
  }
}

template <class Block>
bool launch_rows_pipeline(const AttentionParams& a, void* stream) {
  const int cache_rows = a.cache_rows.of == nullptr ? a.batch : a.cache_rows.total;
  const cuda::TensorShape keys = {a.k_cache, cache_rows, a.num_kv_heads, a.slots, a.head_dim, a.k_cache_stride};
  const cuda::TensorShape values = {a.v_cache, cache_rows, a.num_kv_heads, a.slots, a.head_dim, a.v_cache_stride};
  const bool boxes = cuda::has_boxes(keys) && cuda::has_boxes(values);
  if (!boxes && a.slots > 0) return false;
  const cuda::LaunchOptions& options = cuda::launch_options();
  const DecodeRequest request = decode_request(a);
  const DecodePlan plan = plan_rows_launch<Block>(request, rows_pipeline_kernel<Block>, Block::kBlockThreads);
  if (plan.cluster == 1) return false;
  RowsParams p = {};
  static_cast<Params&>(p) = rows_params(a, request, plan);
  if (boxes) {
    p.boxes[0] = cuda::box_map(keys, Block::kKeys), p.boxes[1] = cuda::box_map(values, Block::kKeys);
    const int64_t readable = readable_slots(0, a.batch, a.num_kv_heads);
    p.early_slots = request.by_rows ? 0 : static_cast<int>(std::min<int64_t>(a.slots, readable));
  }
  cuda::LaunchConfig config = rows_config(plan, Block::kBlockThreads);
  config.dependent_launch = options.dependent_launch;
  cuda::launch(rows_pipeline_kernel<Block>, config, p, stream);
  return true;
}

template <class Element>
bool launch_decode_rows(const AttentionParams& a, void* stream) {
  const cuda::LaunchOptions& options = cuda::launch_options();
  const int rows = a.num_q_heads / a.num_kv_heads * a.q_len;
  const bool serves = rows > max_rows(a.head_dim) && a.batch == 1 && !options.force_plain && options.cluster != 1 &&
                      cuda::device_facts().arch == 90;  // what is compiled for sm_90a runs on no other
  if (!serves) return false;
  bool launched = false;
  dispatch_head_dim(a.head_dim, [&](auto head_dim) {
    constexpr int kHeadDim = decltype(head_dim)::value;
    if constexpr (kHeadDim == 64 || kHeadDim == 128) {
      dispatch_bool(rows <= 64, [&](auto few) {
        constexpr int kRowGroups = decltype(few)::value ? 1 : 2;
        launched = launch_rows_pipeline<RowsPipelineBlock<Element, kHeadDim, kRowGroups>>(a, stream);
      });
    }
  });
  return launched;
}

}  // namespace zigzag::decode_full
