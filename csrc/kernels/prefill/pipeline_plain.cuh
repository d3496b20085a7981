// The pipeline kernel over plain caches. Whole steps of keys that lie in the cache, or in the chunk, come as boxes by
// the tensor copy engine; the step that spans both, and the last one, come row by row with zeros behind the last key.
#pragma once

#include "core/dispatch.h"
#include "cuda/tensor_map.h"
#include "kernels/prefill/pipeline.cuh"

namespace zigzag::prefill {

struct PlainParams : PipelineParams {
  bool has_boxes[2];        // [0] of the chunk, [1] of the cache
  CUtensorMap boxes[2][2];  // of the same: keys, values
};

// Scores of plain keys.
template <class Block, bool kCapped>
struct PlainKeys {
  float scale;    // in units of log2; as in prefill_kernel
  float softcap;  // in units of log2

  template <bool kMasked>
  __device__ __forceinline__ bool weigh(PrefillState<Block>& state, typename Block::Scores& scores,
                                        const QueryTile& tile, int step, int,
                                        float (&rescale)[Block::kRowTiles][2]) const {
    if constexpr (kCapped) cap(scores, scale, softcap);
    if constexpr (kMasked) mask_scores<Block>(scores, tile, step * Block::kKeys);
    return prefill::weigh<Block>(state, scores, scale, rescale);
  }

  __device__ __forceinline__ void finish(PrefillState<Block>&) const {}
};

// Queries by all threads that own rows; a negative scale turns their signs, which turns those of all scores.
template <class Block>
__device__ __forceinline__ void bring_queries(const AttentionParams& p, const QueryTile& tile, unsigned char* shared) {
  load_queries<Block>(p, tile, shared_address(shared));
  cp_async_commit();
  cp_async_wait<0>();
  if (p.scale < 0.0f) {
#pragma unroll 1
    for (int i = threadIdx.x; i < Block::kRows * Block::kChunks; i += Block::kThreads) {  // the same as load_queries
      uint4* piece = reinterpret_cast<uint4*>(shared + Block::query_offset(i / Block::kChunks, i % Block::kChunks));
      const uint4 x = *piece;
      constexpr uint32_t kSigns = 0x80008000u;
      *piece = make_uint4(x.x ^ kSigns, x.y ^ kSigns, x.z ^ kSigns, x.w ^ kSigns);
    }
  }
  fence_proxy_async();
  named_barrier_sync(kRowWarpsBarrier, Block::kThreads);
}

// The producers: all 128 threads keep pace, so that none of them is a phase ahead.
template <class Block, class Barriers>
__device__ __forceinline__ void bring_plain_keys(const PlainParams& p, const QueryTile& tile, const StepRange& steps,
                                                 Barriers& barriers, uint32_t stages) {
  const int thread = threadIdx.x - Block::kThreads;
  const RingLayout layout{p.sink, p.window, p.slots};
  StageCursor<Block::kStages> cursor;
#pragma unroll 1
  for (int step = steps.begin; step < steps.end; ++step, cursor.advance()) {
    const int number = step * Block::kKeys, position = tile.keys.first + number;
    const bool cached = position + Block::kKeys <= tile.length;
    const bool fresh = position >= tile.length && number + Block::kKeys <= tile.keys.count;
    const uint32_t k_tile = stages + cursor.stage * Block::kStageBytes;
    const uint32_t k_full = shared_address(&barriers.k_full[cursor.stage]);
    const uint32_t v_full = shared_address(&barriers.v_full[cursor.stage]);
    // Of the first round the stages are empty already: see barrier_wait.
    barrier_wait(shared_address(&barriers.k_empty[cursor.stage]), cursor.parity ^ 1);
    if ((cached && p.has_boxes[1]) || (fresh && p.has_boxes[0])) {
      const int token = cached ? position : position - tile.length + tile.pad;
      const int head = cached ? tile.cache_head : tile.kv_head, row = cached ? tile.cache_row : tile.batch;
      const auto copy = [&](int which, uint32_t destination, uint32_t full) {
        barrier_expect(full, Block::kKeyBytes);
#pragma unroll
        for (int block = 0; block < Block::kHeadDim / 64; ++block) {
          copy_box(destination + block * Block::kKeyChunkBytes, &p.boxes[cached][which], block * 64, token, head, row,
                   full);
        }
      };
      if (thread == 0) copy(0, k_tile, k_full);
      barrier_wait(shared_address(&barriers.v_empty[cursor.stage]), cursor.parity ^ 1);
      if (thread == 0) copy(1, k_tile + Block::kKeyBytes, v_full);
    } else {
      barrier_wait(shared_address(&barriers.v_empty[cursor.stage]), cursor.parity ^ 1);
      load_keys<Block, Block::kProducers>(layout, tile, number, k_tile, thread);
      cp_async_commit();
      cp_async_wait<0>();
      fence_proxy_async();
      warpgroup_barrier();
      if (thread == 0) barrier_arrive(k_full), barrier_arrive(v_full);
    }
  }
}

// Grid: see pipeline_config. Two warpgroups own rows, the third brings keys and values.
template <class Block, bool kCapped>
__global__ void __launch_bounds__(Block::kBlockThreads, 1) pipeline_kernel(const __grid_constant__ PlainParams p) {
  extern __shared__ __align__(Block::kAlignment) unsigned char shared[];
  using Barriers = PipelineBarriers<Block::kStages>;
  __shared__ Barriers barriers;
  __shared__ QueryTile tile;
  if (threadIdx.x == 0) tile = QueryTile::of_block(p, Block::kRows);
  if (threadIdx.x == Block::kThreads) {
    barriers.init(Block::kThreads / 32);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (p.has_boxes[i / 2]) prefetch_tensor_map(&p.boxes[i / 2][i % 2]);
    }
  }
  __syncthreads();
  const StepRange steps = StepRange::of(tile.keys, blockIdx.y, gridDim.y);
  if (threadIdx.x >= Block::kThreads) {
    give_registers<40>();
    bring_plain_keys<Block>(p, tile, steps, barriers, shared_address(shared) + Block::kQueryBytes);
  } else {
    take_registers<232>();
    // As in prefill_kernel.
    const float scale = fmaxf(fabsf(p.scale) * 1.44269504088896f, 1e-30f);
    const PlainKeys<Block, kCapped> keys = {scale, p.softcap * 1.44269504088896f};
    bring_queries<Block>(p, tile, shared);
    own_rows<Block>(p, tile, steps, barriers, keys, shared);
  }
}

template <class T>
void launch_prefill_pipeline(const AttentionParams& a, const PrefillPlan& plan, void* stream) {
  dispatch_head_dim(a.head_dim, [&](auto head_dim) {
    constexpr int kHeadDim = decltype(head_dim)::value;
    if constexpr (kHeadDim == 64 || kHeadDim == 128) {
      using Block = PipelineBlock<T, T, kHeadDim, kHeadDim == 128 ? 3 : 6>;  // 192 KB
      static_assert(Block::kStagesEnd <= 226 * 1024 - 2048, "with what the kernel declares itself");
      PlainParams p = {};
      static_cast<AttentionParams&>(p) = a;
      p.splits = plan.splits;
      const int new_heads = a.heads.of == nullptr ? a.num_kv_heads : a.heads.total;
      const int cache_rows = a.cache_rows.of == nullptr ? a.batch : a.cache_rows.total;
      const auto describe = [&](int source, const TensorShape& keys, const TensorShape& values) {
        p.has_boxes[source] = has_boxes(keys) && has_boxes(values);
        if (!p.has_boxes[source]) return;
        p.boxes[source][0] = box_map(keys, Block::kKeys), p.boxes[source][1] = box_map(values, Block::kKeys);
      };
      describe(0, {a.k_new, a.batch, new_heads, a.q_len, kHeadDim, a.k_new_stride},
               {a.v_new, a.batch, new_heads, a.q_len, kHeadDim, a.v_new_stride});
      describe(1, {a.k_cache, cache_rows, a.num_kv_heads, a.slots, kHeadDim, a.k_cache_stride},
               {a.v_cache, cache_rows, a.num_kv_heads, a.slots, kHeadDim, a.v_cache_stride});
      const LaunchConfig config = pipeline_config<Block>(plan, Block::kStagesEnd);
      launch(a.softcap > 0.0f ? pipeline_kernel<Block, true> : pipeline_kernel<Block, false>, config, p, stream);
      launch_merge_parts<T, false>(a, plan, stream);
    }
  });
}

}  // namespace zigzag::prefill
