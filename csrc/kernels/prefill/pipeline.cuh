// Attention of a chunk over a full cache and itself, on sm_90a: one warpgroup brings keys and values, two own 64 query
// rows each. What a warpgroup does with a step of 128 keys, scores S, weights P, output O:
//
//     S = Q K^T of step i and O += P V of step i - 1 start; S is ready: weigh it while P V runs; O is ready: next step
//
// and the two warpgroups take turns in starting products, so that one weighs while those of the other run (as
// FlashAttention-3 does it, https://arxiv.org/abs/2407.08608; written anew on this project's tiles, masks and states).
//
// What differs between plain caches and codes is who fills a stage (pipeline_plain.cuh, pipeline_codes.cuh), how
// queries come, and what is done with scores: `Keys` below.
#pragma once

#include "kernels/prefill/pipeline_block.cuh"
#include "kernels/prefill/pipeline_parts.cuh"
#include "kernels/prefill/prefill.cuh"

namespace zigzag::prefill {

// Barriers by number: 0 is __syncthreads, 1 to 3 are those of the warpgroups (warpgroup_barrier).
inline constexpr int kTurnBarrier = 4;      // and 5: the turn of warpgroup 0, 1
inline constexpr int kRowWarpsBarrier = 6;  // all warps that own rows

struct PipelineParams : AttentionParams {
  int splits;  // blocks that share the keys of a tile of rows
};

// The steps of a block, and how many of them need no mask.
struct StepRange {
  int begin, end, masked;  // `masked`: the first that needs a mask, in [begin, end]

  static __device__ __forceinline__ StepRange of(const KeyRange& keys, int split, int splits) {
    const int64_t steps = (keys.count + kPipelineKeys - 1) / kPipelineKeys;
    const int begin = static_cast<int>(steps * split / splits), end = static_cast<int>(steps * (split + 1) / splits);
    // Of a full cache every query sees all keys up to the first query's own.
    const int visible = (keys.first_query + 1 - keys.first) / kPipelineKeys;
    return {begin, end, min(max(visible, begin), end)};
  }
};

// `keys`: what weighs the scores of a step. keys.weigh<kMasked>(state, scores, tile, step, stage, rescale) -> whether
// the maximum of a row of this lane changed.
template <class Block, class Barriers, class Keys>
struct RowOwner {
  PrefillState<Block>& state;
  const QueryTile& tile;
  Barriers& barriers;
  const Keys& keys;
  uint32_t q_tile, stages;
  int group;  // 0 or 1: the warpgroup
  typename Block::Weights weights;
  StageCursor<Block::kStages> k, v;

  __device__ __forceinline__ uint32_t stage_of(int stage) const { return stages + stage * Block::kStageBytes; }

  // One arrival a warp: all lanes are behind the wait for its products.
  __device__ __forceinline__ static void release(uint64_t& empty, bool always = true) {
    if (threadIdx.x % 32 == 0 && always) barrier_arrive(shared_address(&empty));
  }

  // Weighs the scores of a step, then gives its stage of K back. Sums are never negative, which the compiler does not
  // know: it would otherwise leave all of this until the values are multiplied.
  template <bool kMasked>
  __device__ __forceinline__ bool weigh(typename Block::Scores& scores, int step,
                                        float (&rescale)[Block::kRowTiles][2]) {
    const bool changed = keys.template weigh<kMasked>(state, scores, tile, step, k.stage, rescale);
    __syncwarp();
    release(barriers.k_empty[k.stage], state.sum[0][0] != -1.0f && state.sum[0][1] != -1.0f);
    return changed;
  }

  // The first step has no values to multiply before it.
  __device__ __forceinline__ void first(int step, bool masked) {
    typename Block::Scores scores;
    float rescale[Block::kRowTiles][2];
    barrier_wait(shared_address(&barriers.k_full[k.stage]), k.parity);
    Block::start_scores(scores, q_tile, stage_of(k.stage));
    wgmma_wait<0>();
    hold_accumulators(scores[0]);
    if (masked) {
      weigh<true>(scores, step, rescale);
    } else {
      weigh<false>(scores, step, rescale);
    }
    Block::pack(weights, scores);
    k.advance();
  }

  template <bool kMasked>
  __device__ __forceinline__ void next(int step, bool last) {
    typename Block::Scores scores;
    float rescale[Block::kRowTiles][2];
    barrier_wait(shared_address(&barriers.k_full[k.stage]), k.parity);
    named_barrier_sync(kTurnBarrier + group, 256);
    Block::start_scores(scores, q_tile, stage_of(k.stage));
    barrier_wait(shared_address(&barriers.v_full[v.stage]), v.parity);
    Block::start_values(state.out, weights, stage_of(v.stage) + Block::kKeyBytes);
    // The turn of warpgroup 0 has been announced once before its first: its last one needs nothing more.
    if (group == 0 || !last) named_barrier_arrive(kTurnBarrier + 1 - group, 256);
    wgmma_wait<1>();  // the scores; the values may still run
    hold_accumulators(scores[0]);
    const bool changed = weigh<kMasked>(scores, step, rescale);
    wgmma_wait<0>();
    hold_accumulators(state.out[0]);
    hold_fragments(weights);
    release(barriers.v_empty[v.stage]);
    rescale_output<Block>(state, rescale, changed);
    Block::pack(weights, scores);
    k.advance();
    v.advance();
  }

  __device__ __forceinline__ void finish() {
    barrier_wait(shared_address(&barriers.v_full[v.stage]), v.parity);
    Block::start_values(state.out, weights, stage_of(v.stage) + Block::kKeyBytes);
    wgmma_wait<0>();
    hold_accumulators(state.out[0]);
  }

  __device__ __forceinline__ void run(const StepRange& steps) {
    if (steps.begin == steps.end) return;
    if (group == 1 && steps.begin + 1 < steps.end) named_barrier_arrive(kTurnBarrier, 256);
    first(steps.begin, steps.begin >= steps.masked);
    int step = steps.begin + 1;
#pragma unroll 1
    for (; step < steps.masked; ++step) next<false>(step, step + 1 == steps.end);
#pragma unroll 1
    for (; step < steps.end; ++step) next<true>(step, step + 1 == steps.end);
    finish();
  }
};

// All 256 threads that own rows.
template <class Block, class Barriers, class Keys>
__device__ __forceinline__ void own_rows(const PipelineParams& p, const QueryTile& tile, const StepRange& steps,
                                         Barriers& barriers, const Keys& keys, unsigned char* shared) {
  PrefillState<Block> state = {};
  state.top[0][0] = state.top[0][1] = -INFINITY;
  const uint32_t q_tile = shared_address(shared);
  RowOwner<Block, Barriers, Keys> owner = {
      state, tile, barriers, keys, q_tile, q_tile + Block::kQueryBytes, static_cast<int>(threadIdx.x / 128),
      {},    {},   {}};
  owner.run(steps);
  keys.finish(state);
  if (p.splits == 1) {
    store_output<Block>(p, tile, state, shared);
  } else {
    store_part<Block>(p.workspace, state);
  }
}

// Grid of a launch: (tiles, splits). A tile of rows is (batch, KV head, 128 rows) as QueryTile::of_block numbers them.
template <class Block>
LaunchConfig pipeline_config(const PrefillPlan& plan, int shared_bytes) {
  LaunchConfig config;
  config.grid = dim3(static_cast<unsigned>(plan.tiles), static_cast<unsigned>(plan.splits));
  config.block = dim3(Block::kBlockThreads);
  config.shared_bytes = shared_bytes;
  return config;
}

}  // namespace zigzag::prefill
