// Attention of many new tokens over the cache and themselves, FlashAttention-2 style
// (https://arxiv.org/abs/2307.08691): scores and output stay in registers, K and V stream through two shared memory
// stages. Full caches and rings differ only in the key numbering of key_range.h. The cache is read only; the append is
// a launch of its own that follows.
#pragma once

#include <cmath>

#include "core/params.h"
#include "cuda/ptx.cuh"
#include "cuda/softcap.cuh"
#include "kernels/prefill/query_tile.cuh"

namespace zigzag::prefill {
using namespace cuda;  // PTX wrappers and the launch helper

// The part of the output that one warp owns, and its softmax state, in base 2. Rows as in an m16n8k16 accumulator: a
// lane holds rows lane / 4 + 8 * half of each row tile.
template <class Block>
struct PrefillState {
  typename Block::Output out;
  float top[Block::kRowTiles][2];  // running maximum of the row, -inf before its first visible key
  float sum[Block::kRowTiles][2];  // of this lane's columns only
};

// Row of the block's tile that this lane holds.
template <class Block>
__device__ __forceinline__ int lane_row(int row_tile, int half) {
  constexpr int kRowWarps = Block::kRows / (16 * Block::kRowTiles);
  const int warp = threadIdx.x / 32 % kRowWarps, lane = threadIdx.x % 32;
  return (warp * Block::kRowTiles + row_tile) * 16 + half * 8 + lane / 4;
}

template <class Block>
__device__ __forceinline__ void load_queries(const AttentionParams& p, const QueryTile& tile, uint32_t q_tile) {
  using T = typename Block::Element;
  const T* q = static_cast<const T*>(p.q) + tile.batch * p.q_stride.batch;
#pragma unroll 4
  for (int i = threadIdx.x; i < Block::kRows * Block::kChunks; i += Block::kThreads) {
    const int row = i / Block::kChunks, chunk = i % Block::kChunks;
    const int column = tile.column(row);
    const bool valid = column >= tile.pad && column < p.q_len;
    const int64_t source = valid ? tile.head(row) * p.q_stride.head + column * p.q_stride.token + chunk * 8 : 0;
    cp_async_16(q_tile + Block::query_offset(row, chunk), q + source, valid);
  }
}

// Keys [number, number + kKeys) of the tile and their values. Rows past the last key become zeros, so that whatever
// memory holds there, NaN included, cannot reach the output through a weight of 0. A thread owns a few rows, at fixed
// distances, so that one address serves several 16-byte chunks.
// `thread`: of the kThreads that load.
template <class Block, int kThreads = Block::kThreads>
__device__ __forceinline__ void load_keys(RingLayout layout, const QueryTile& tile, int number, uint32_t k_tile,
                                          int thread = threadIdx.x) {
  constexpr int kRowStep = kThreads / Block::kThreadsPerRow;
  const int first_row = thread / Block::kThreadsPerRow, first_chunk = thread % Block::kThreadsPerRow;
  const uint32_t first_destination = k_tile + Block::key_offset(first_row, first_chunk);
#pragma unroll 2  // more would spill
  for (int i = 0; i < Block::kKeys / kRowStep; ++i) {
    const int key = number + first_row + i * kRowStep;
    const bool valid = key < tile.keys.count;
    const int position = valid ? tile.keys.position(key) : tile.length;
    const bool cached = position < tile.length;
    const int token = cached ? layout.slot(position) : position - tile.length + tile.pad;
    const KeySource& source = tile.source[cached];
    const char* k = source.k + token * source.k_bytes + first_chunk * 16;
    const char* v = source.v + token * source.v_bytes + first_chunk * 16;
#pragma unroll
    for (int j = 0; j < Block::kChunks / Block::kThreadsPerRow; ++j) {
      const uint32_t destination = first_destination + i * kRowStep * Block::kRowBytes + j * Block::kKeyChunkBytes;
      cp_async_16_reused(destination, k + j * Block::kThreadsPerRow * 16, valid);
      cp_async_16_reused(destination + Block::kKeyBytes, v + j * Block::kThreadsPerRow * 16, valid);
    }
  }
}

// -inf where the row's query does not see the key.
template <class Block>
__device__ __forceinline__ void mask_scores(typename Block::Scores& scores, const QueryTile& tile, int number) {
  // All numbers from here on count from the lane's first column.
  number += threadIdx.x % 4 * 2;
  const int num_sink = tile.keys.num_sink - number;
#pragma unroll
  for (int m = 0; m < Block::kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Rows of padding columns would be negative; their scores are never used.
      const int query = max(0, tile.position(tile.column(lane_row<Block>(m, half))));
      const int begin = tile.keys.window_begin(query) - number, end = tile.keys.end(query) - number;
#pragma unroll
      for (int n = 0; n < Block::kKeys / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int key = n * 8 + e;
          const bool hidden = (num_sink <= key && key < begin) || end <= key;
          if (hidden) scores[m][n][half * 2 + e] = -INFINITY;
        }
      }
    }
  }
}

template <int kRowTiles, int kTiles>
__device__ __forceinline__ void negate(float (&scores)[kRowTiles][kTiles][4]) {
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) scores[m][n][e] = -scores[m][n][e];
    }
  }
}

// Scores whose products with `scale` are capped: softcap * tanh(product / softcap), in units of log2 as the product is.
template <int kRowTiles, int kTiles>
__device__ __forceinline__ void cap(float (&scores)[kRowTiles][kTiles][4], float scale, float softcap) {
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) scores[m][n][e] = soft_capped(scores[m][n][e] * scale, softcap) / scale;
    }
  }
}

// Turns scores into weights, 2^(scale * score), relative to the row's new maximum, and adds them up. `rescale` is what
// the output so far is still to be multiplied by; returns whether that changes anything in this lane. A row without a
// visible key so far keeps its maximum of -inf; 0 stands in for it, as -inf - -inf would be NaN.
template <class Block>
__device__ __forceinline__ bool weigh(PrefillState<Block>& state, typename Block::Scores& scores, float scale,
                                      float (&rescale)[Block::kRowTiles][2]) {
  bool changed = false;
#pragma unroll
  for (int m = 0; m < Block::kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = -INFINITY;
#pragma unroll
      for (int n = 0; n < Block::kKeys / 8; ++n) {
        top = fmaxf(top, fmaxf(scores[m][n][half * 2], scores[m][n][half * 2 + 1]));
      }
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
      top = fmaxf(state.top[m][half], top * scale);
      const float base = top == -INFINITY ? 0.0f : top;
      rescale[m][half] = exp2_approx(state.top[m][half] - base);
      changed |= state.top[m][half] != top;
      state.top[m][half] = top;
      float sum = 0.0f;
#pragma unroll
      for (int n = 0; n < Block::kKeys / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float weight = exp2_approx(fmaf(scores[m][n][half * 2 + e], scale, -base));
          scores[m][n][half * 2 + e] = weight;
          sum += weight;
        }
      }
      state.sum[m][half] = state.sum[m][half] * rescale[m][half] + sum;
    }
  }
  return changed;
}

// By all lanes of a warp; `changed`: of this one.
template <class Block>
__device__ __forceinline__ void rescale_output(PrefillState<Block>& state, const float (&rescale)[Block::kRowTiles][2],
                                               bool changed) {
  if (!__any_sync(0xffffffffu, changed)) return;
#pragma unroll
  for (int m = 0; m < Block::kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < Block::kPartDim / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) state.out[m][n][e] *= rescale[m][e / 2];
    }
  }
}

template <class Block>
__device__ __forceinline__ void update_softmax(PrefillState<Block>& state, typename Block::Scores& scores,
                                               float scale) {
  float rescale[Block::kRowTiles][2];
  const bool changed = weigh<Block>(state, scores, scale, rescale);
  rescale_output<Block>(state, rescale, changed);
}

// Normalises what the warp has of its rows and writes it, through its place in the Q tile so that global stores are 16
// bytes wide.
template <class Block>
__device__ __forceinline__ void store_output(const AttentionParams& p, const QueryTile& tile,
                                             PrefillState<Block>& state, unsigned char* q_tile) {
  using T = typename Block::Element;
  constexpr int kRowThreads = Block::kThreads / Block::kParts, kPartChunks = Block::kChunks / Block::kParts;
  const int warp = threadIdx.x % kRowThreads / 32, lane = threadIdx.x % 32, part = threadIdx.x / kRowThreads;
  const int first_chunk = part * kPartChunks;
  Block::release_queries();
#pragma unroll
  for (int m = 0; m < Block::kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = lane_row<Block>(m, half), column = tile.column(row);
      float sum = state.sum[m][half];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      float top = state.top[m][half], weight = 1.0f;
      if (p.sink_logits != nullptr && sum != 0.0f && column < p.q_len) {
        const float logit = 1.44269504088896f * __ldg(p.sink_logits + tile.head(row)), high = fmaxf(top, logit);
        weight = exp2_approx(top - high);
        sum = sum * weight + exp2_approx(logit - high);
        top = high;
      }
      const float inverse = sum == 0.0f ? 0.0f : weight / sum;
#pragma unroll
      for (int n = 0; n < kPartChunks; ++n) {
        const float* pair = &state.out[m][n][half * 2];
        *reinterpret_cast<uint32_t*>(q_tile + Block::query_offset(row, first_chunk + n) + lane % 4 * 4) =
            pack2<T>(pair[0] * inverse, pair[1] * inverse);
      }
      if (lane % 4 == 0 && part == 0 && column < p.q_len) {
        constexpr float kLn2 = 0.693147180559945f;
        const int64_t index =
            (static_cast<int64_t>(tile.batch) * p.lse_heads(tile.group) + tile.head(row)) * p.q_len + column;
        p.lse[index] = column < tile.pad ? -INFINITY : (top + log2f(sum)) * kLn2;
      }
    }
  }
  __syncwarp();
  T* out = static_cast<T*>(p.out) + tile.batch * p.out_stride.batch;
  constexpr int kWarpRows = 16 * Block::kRowTiles;
#pragma unroll 4
  for (int i = lane; i < kWarpRows * kPartChunks; i += 32) {
    const int row = warp * kWarpRows + i / kPartChunks, chunk = first_chunk + i % kPartChunks;
    const int column = tile.column(row);
    if (column >= p.q_len) break;  // so are all later rows
    uint4 value = *reinterpret_cast<const uint4*>(q_tile + Block::query_offset(row, chunk));
    if (column < tile.pad) value = make_uint4(0, 0, 0, 0);
    *reinterpret_cast<uint4*>(out + tile.head(row) * p.out_stride.head + column * p.out_stride.token + chunk * 8) =
        value;
  }
}

// `Block` is MmaBlock or WgmmaBlock: tile sizes, the layout of shared memory, and the two matrix products.
// Grid: one block per (tile of rows, batch, KV head); a warp owns 16 * kRowTiles rows, or a part of their output, and
// walks all keys of the tile.
// kCapped: whether logits are, a switch of its own so that warpgroup products meet no branch.
template <class Block, bool kCapped>
__global__ void __launch_bounds__(Block::kThreads, Block::kBlocksPerSm)
    prefill_kernel(const __grid_constant__ AttentionParams p) {
  extern __shared__ __align__(Block::kAlignment) unsigned char shared[];
  const uint32_t q_tile = shared_address(shared);
  const uint32_t stages = q_tile + Block::kQueryBytes;
  // In shared memory, as the accumulators need the registers.
  __shared__ QueryTile tile;
  if (threadIdx.x == 0) tile = QueryTile::of_block(p, Block::kRows);
  __syncthreads();
  const RingLayout layout{p.sink, p.window, p.slots};
  // Positive, so that the largest score is the largest logit, and never 0, which times a hidden key's -inf would be
  // NaN. log2(e): the softmax works in base 2.
  const float scale = fmaxf(fabsf(p.scale) * 1.44269504088896f, 1e-30f);

  PrefillState<Block> state = {};
#pragma unroll
  for (int m = 0; m < Block::kRowTiles; ++m) state.top[m][0] = state.top[m][1] = -INFINITY;

  if (tile.keys.count > 0) {
    load_queries<Block>(p, tile, q_tile);
    load_keys<Block>(layout, tile, 0, stages);
    cp_async_commit();
  }
  uint32_t stage = 0;
  for (int number = 0; number < tile.keys.count; number += Block::kKeys) {
    const uint32_t k_tile = stages + stage * 2 * Block::kKeyBytes;
    // Everything this thread asked for has arrived, then everything of every thread; and nobody reads the other stage
    // any more.
    cp_async_wait<0>();
    Block::publish();
    __syncthreads();
    stage ^= 1;
    if (number + Block::kKeys < tile.keys.count) {
      load_keys<Block>(layout, tile, number + Block::kKeys, stages + stage * 2 * Block::kKeyBytes);
      cp_async_commit();
    }
    typename Block::Scores scores;
    Block::multiply_queries(scores, q_tile, k_tile);
    if (p.scale < 0.0f) negate(scores);
    if constexpr (kCapped) cap(scores, scale, p.softcap * 1.44269504088896f);
    if (!tile.keys.all_visible(number, Block::kKeys)) mask_scores<Block>(scores, tile, number);
    update_softmax<Block>(state, scores, scale);
    Block::multiply_values(state.out, scores, k_tile + Block::kKeyBytes);
  }
  store_output<Block>(p, tile, state, shared);
}

}  // namespace zigzag::prefill
