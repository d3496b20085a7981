// Attention of many new tokens over the cache and themselves, FlashAttention-2 style
// (https://arxiv.org/abs/2307.08691): scores and output stay in registers, K and V stream through two shared memory
// stages. Full caches and rings differ only in the key numbering of key_range.h. The cache is read only; the append is
// a launch of its own that follows.
#pragma once

#include <cmath>

#include "core/params.h"
#include "device/launch.h"
#include "device/ptx.cuh"
#include "kernels/prefill/query_tile.cuh"

namespace zigzag::device {

// The part of the output that one warp owns, and its softmax state, in base 2. Rows as in an m16n8k16 accumulator: a
// lane holds rows lane / 4 + 8 * half of each row tile.
template <int kHeadDim>
struct PrefillState {
  using Shape = PrefillShape<kHeadDim>;
  float out[Shape::kRowTiles][kHeadDim / 8][4];
  float top[Shape::kRowTiles][2];  // running maximum of the row, -inf before its first visible key
  float sum[Shape::kRowTiles][2];  // of this lane's columns only
};

template <int kHeadDim>
using PrefillScores = float[PrefillShape<kHeadDim>::kRowTiles][PrefillShape<kHeadDim>::kKeys / 8][4];

// Row of the block's tile that this lane holds.
template <int kHeadDim>
__device__ __forceinline__ int lane_row(int row_tile, int half) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  return (warp * PrefillShape<kHeadDim>::kRowTiles + row_tile) * 16 + half * 8 + lane / 4;
}

template <class T, int kHeadDim>
__device__ __forceinline__ void load_queries(const AttentionParams& p, const QueryTile& tile, uint32_t q_tile) {
  using Shape = PrefillShape<kHeadDim>;
  const T* q = static_cast<const T*>(p.q) + tile.batch * p.q_stride.batch;
#pragma unroll 4
  for (int i = threadIdx.x; i < Shape::kRows * Shape::kChunks; i += Shape::kThreads) {
    const int row = i / Shape::kChunks, chunk = i % Shape::kChunks;
    const int column = tile.column(row);
    const bool valid = column >= tile.pad && column < p.q_len;
    const int64_t source = valid ? tile.head(row) * p.q_stride.head + column * p.q_stride.token + chunk * 8 : 0;
    cp_async_16(q_tile + Shape::offset(row, chunk), q + source, valid);
  }
}

// Keys [number, number + kKeys) of the tile and their values. Rows past the last key become zeros, so that whatever
// memory holds there, NaN included, cannot reach the output through a weight of 0. A thread owns a few rows, at fixed
// distances, so that one address serves several 16-byte chunks.
template <int kHeadDim>
__device__ __forceinline__ void load_keys(RingLayout layout, const QueryTile& tile, int number, uint32_t k_tile) {
  using Shape = PrefillShape<kHeadDim>;
  constexpr int kRowStep = Shape::kThreads / Shape::kThreadsPerRow;
  const int first_row = threadIdx.x / Shape::kThreadsPerRow, first_chunk = threadIdx.x % Shape::kThreadsPerRow;
  const uint32_t first_destination = k_tile + Shape::offset(first_row, first_chunk);
#pragma unroll 2  // more would spill
  for (int i = 0; i < Shape::kKeys / kRowStep; ++i) {
    const int key = number + first_row + i * kRowStep;
    const bool valid = key < tile.keys.count;
    const int position = valid ? tile.keys.position(key) : tile.length;
    const bool cached = position < tile.length;
    const int token = cached ? layout.slot(position) : position - tile.length + tile.pad;
    const KeySource& source = tile.source[cached];
    const char* k = source.k + token * source.k_bytes + first_chunk * 16;
    const char* v = source.v + token * source.v_bytes + first_chunk * 16;
#pragma unroll
    for (int j = 0; j < Shape::kChunks / Shape::kThreadsPerRow; ++j) {
      const uint32_t destination = first_destination + i * kRowStep * Shape::kRowBytes + j * Shape::kThreadsPerRow * 16;
      cp_async_16_reused(destination, k + j * Shape::kThreadsPerRow * 16, valid);
      cp_async_16_reused(destination + Shape::kKeyBytes, v + j * Shape::kThreadsPerRow * 16, valid);
    }
  }
}

// scores = q . k for the warp's rows.
template <class T, int kHeadDim>
__device__ __forceinline__ void multiply_queries(PrefillScores<kHeadDim>& scores, uint32_t q_tile, uint32_t k_tile) {
  using Shape = PrefillShape<kHeadDim>;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint32_t q_warp = q_tile + warp * Shape::kRowTiles * 16 * Shape::kRowBytes;
  const int q_lane = Shape::offset(lane % 16, lane / 16);
  const int k_lane = Shape::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
  for (int step = 0; step < kHeadDim / 16; ++step) {
    uint32_t q[Shape::kRowTiles][4];
#pragma unroll
    for (int m = 0; m < Shape::kRowTiles; ++m) {
      ldmatrix_x4(q[m], q_warp + m * 16 * Shape::kRowBytes + Shape::advance(q_lane, step));
    }
#pragma unroll
    for (int n = 0; n < Shape::kKeys / 16; ++n) {
      uint32_t k[4];
      ldmatrix_x4(k, k_tile + n * 16 * Shape::kRowBytes + Shape::advance(k_lane, step));
#pragma unroll
      for (int m = 0; m < Shape::kRowTiles; ++m) {
        mma_m16n8k16<T>(scores[m][2 * n], q[m], k[0], k[1]);
        mma_m16n8k16<T>(scores[m][2 * n + 1], q[m], k[2], k[3]);
      }
    }
  }
}

// -inf where the row's query does not see the key.
template <int kHeadDim>
__device__ __forceinline__ void mask_scores(PrefillScores<kHeadDim>& scores, const QueryTile& tile, int number) {
  using Shape = PrefillShape<kHeadDim>;
  const int lane = threadIdx.x % 32;
  int query[Shape::kRowTiles][2];
#pragma unroll
  for (int m = 0; m < Shape::kRowTiles; ++m) {
#pragma unroll
    // Rows of padding columns would be negative; their scores are never used.
    for (int half = 0; half < 2; ++half)
      query[m][half] = max(0, tile.position(tile.column(lane_row<kHeadDim>(m, half))));
  }
#pragma unroll
  for (int n = 0; n < Shape::kKeys / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const KeyBounds key = tile.keys.bounds(number + n * 8 + lane % 4 * 2 + e);
#pragma unroll
      for (int m = 0; m < Shape::kRowTiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (!tile.keys.visible(key, query[m][half])) scores[m][n][half * 2 + e] = -INFINITY;
        }
      }
    }
  }
}

// Turns scores (base 2) into weights relative to the row's new maximum and rescales what was summed before. A row
// without a visible key so far keeps its maximum of -inf; 0 stands in for it, as -inf - -inf would be NaN.
template <int kHeadDim>
__device__ __forceinline__ void update_softmax(PrefillState<kHeadDim>& state, PrefillScores<kHeadDim>& scores) {
  using Shape = PrefillShape<kHeadDim>;
  float rescale[Shape::kRowTiles][2];
  bool changed = false;
#pragma unroll
  for (int m = 0; m < Shape::kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = state.top[m][half];
#pragma unroll
      for (int n = 0; n < Shape::kKeys / 8; ++n) {
        top = fmaxf(top, fmaxf(scores[m][n][half * 2], scores[m][n][half * 2 + 1]));
      }
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
      const float base = top == -INFINITY ? 0.0f : top;
      rescale[m][half] = exp2_approx(state.top[m][half] - base);
      changed |= state.top[m][half] != top;
      state.top[m][half] = top;
      float sum = 0.0f;
#pragma unroll
      for (int n = 0; n < Shape::kKeys / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float weight = exp2_approx(scores[m][n][half * 2 + e] - base);
          scores[m][n][half * 2 + e] = weight;
          sum += weight;
        }
      }
      state.sum[m][half] = state.sum[m][half] * rescale[m][half] + sum;
    }
  }
  if (!__any_sync(0xffffffffu, changed)) return;
#pragma unroll
  for (int m = 0; m < Shape::kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) state.out[m][n][e] *= rescale[m][e / 2];
    }
  }
}

// out += weights . v. The accumulator of two score tiles is, packed to 16 bits, the A fragment of 16 keys.
template <class T, int kHeadDim>
__device__ __forceinline__ void multiply_values(PrefillState<kHeadDim>& state, const PrefillScores<kHeadDim>& weights,
                                                uint32_t v_tile) {
  using Shape = PrefillShape<kHeadDim>;
  const int lane = threadIdx.x % 32;
  const int v_lane = Shape::offset(lane % 16, lane / 16);
#pragma unroll
  for (int step = 0; step < Shape::kKeys / 16; ++step) {
    uint32_t w[Shape::kRowTiles][4];
#pragma unroll
    for (int m = 0; m < Shape::kRowTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* pair = &weights[m][2 * step + i / 2][i % 2 * 2];
        w[m][i] = pack2<T>(pair[0], pair[1]);
      }
    }
#pragma unroll
    for (int n = 0; n < kHeadDim / 16; ++n) {
      uint32_t v[4];
      ldmatrix_x4_trans(v, v_tile + step * 16 * Shape::kRowBytes + Shape::advance(v_lane, n));
#pragma unroll
      for (int m = 0; m < Shape::kRowTiles; ++m) {
        mma_m16n8k16<T>(state.out[m][2 * n], w[m], v[0], v[1]);
        mma_m16n8k16<T>(state.out[m][2 * n + 1], w[m], v[2], v[3]);
      }
    }
  }
}

// Normalises the warp's rows and writes them, through the warp's own rows of the Q tile so that global stores are 16
// bytes wide.
template <class T, int kHeadDim>
__device__ __forceinline__ void store_output(const AttentionParams& p, const QueryTile& tile,
                                             PrefillState<kHeadDim>& state, unsigned char* q_tile) {
  using Shape = PrefillShape<kHeadDim>;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  __syncwarp();
#pragma unroll
  for (int m = 0; m < Shape::kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = lane_row<kHeadDim>(m, half), column = tile.column(row);
      float sum = state.sum[m][half];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
        const float* pair = &state.out[m][n][half * 2];
        *reinterpret_cast<uint32_t*>(q_tile + Shape::offset(row, n) + lane % 4 * 4) =
            pack2<T>(pair[0] * inverse, pair[1] * inverse);
      }
      if (lane % 4 == 0 && column < p.q_len) {
        constexpr float kLn2 = 0.693147180559945f;
        const int64_t index =
            (static_cast<int64_t>(tile.batch) * p.lse_heads(tile.group) + tile.head(row)) * p.q_len + column;
        p.lse[index] = column < tile.pad ? -INFINITY : (state.top[m][half] + log2f(sum)) * kLn2;
      }
    }
  }
  __syncwarp();
  T* out = static_cast<T*>(p.out) + tile.batch * p.out_stride.batch;
  constexpr int kWarpRows = 16 * Shape::kRowTiles;
#pragma unroll 4
  for (int i = lane; i < kWarpRows * Shape::kChunks; i += 32) {
    const int row = warp * kWarpRows + i / Shape::kChunks, chunk = i % Shape::kChunks;
    const int column = tile.column(row);
    if (column >= p.q_len) break;  // so are all later rows
    uint4 value = *reinterpret_cast<const uint4*>(q_tile + Shape::offset(row, chunk));
    if (column < tile.pad) value = make_uint4(0, 0, 0, 0);
    *reinterpret_cast<uint4*>(out + tile.head(row) * p.out_stride.head + column * p.out_stride.token + chunk * 8) =
        value;
  }
}

// Grid: one block per (tile of rows, batch, KV head); a warp owns 16 * kRowTiles rows and walks all keys of the tile.
template <class T, int kHeadDim>
__global__ void __launch_bounds__(PrefillShape<kHeadDim>::kThreads, PrefillShape<kHeadDim>::kBlocksPerSm)
    prefill_kernel(const __grid_constant__ AttentionParams p) {
  using Shape = PrefillShape<kHeadDim>;
  extern __shared__ __align__(128) unsigned char shared[];
  const uint32_t q_tile = shared_address(shared);
  const uint32_t stages = q_tile + Shape::kRows * Shape::kRowBytes;
  // In shared memory, as the accumulators need the registers.
  __shared__ QueryTile tile;
  if (threadIdx.x == 0) tile = QueryTile::of_block(p, Shape::kRows);
  __syncthreads();
  const RingLayout layout{p.sink, p.window};
  const float scale = p.scale * 1.44269504088896f;  // log2(e): the softmax works in base 2

  PrefillState<kHeadDim> state = {};
#pragma unroll
  for (int m = 0; m < Shape::kRowTiles; ++m) state.top[m][0] = state.top[m][1] = -INFINITY;

  if (tile.keys.count > 0) {
    load_queries<T, kHeadDim>(p, tile, q_tile);
    load_keys<kHeadDim>(layout, tile, 0, stages);
    cp_async_commit();
  }
  uint32_t stage = 0;
  for (int number = 0; number < tile.keys.count; number += Shape::kKeys) {
    const uint32_t k_tile = stages + stage * 2 * Shape::kKeyBytes;
    // Everything this thread asked for has arrived, then everything of every thread; and nobody reads the other stage
    // any more.
    cp_async_wait<0>();
    __syncthreads();
    stage ^= 1;
    if (number + Shape::kKeys < tile.keys.count) {
      load_keys<kHeadDim>(layout, tile, number + Shape::kKeys, stages + stage * 2 * Shape::kKeyBytes);
      cp_async_commit();
    }
    PrefillScores<kHeadDim> scores = {};
    multiply_queries<T, kHeadDim>(scores, q_tile, k_tile);
#pragma unroll
    for (int m = 0; m < Shape::kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < Shape::kKeys / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) scores[m][n][e] *= scale;
      }
    }
    if (!tile.keys.all_visible(number, Shape::kKeys)) mask_scores<kHeadDim>(scores, tile, number);
    update_softmax<kHeadDim>(state, scores);
    multiply_values<T, kHeadDim>(state, scores, k_tile + Shape::kKeyBytes);
  }
  store_output<T, kHeadDim>(p, tile, state, shared);
}

template <class T>
void launch_prefill(const AttentionParams& p, void* stream);

}  // namespace zigzag::device
