// The pipeline kernel over quantised caches. Products are of float16, which holds every code exactly; the producers
// copy codes of a few steps ahead into a ring of their own and widen one step at a time into its stage. The new tokens
// were appended before, so that all keys lie in the cache, and are attended as their codes. What scales do to scores
// and weights, and in which range that is exact enough, is that of the decode kernels:
// kernels/decode/codes/segments.cuh.
#pragma once

#include <type_traits>

#include "core/dispatch.h"
#include "kernels/decode/codes/segments.cuh"
#include "kernels/prefill/code_tiles.cuh"
#include "kernels/prefill/pipeline.cuh"

namespace zigzag::prefill {

// Shared memory: queries and stages, then per stage kScales floats per key, then the ring of codes under way.
template <class T, class KFormat, class VFormat, int kHeadDim>
struct CodeBlock : PipelineBlock<T, __half, kHeadDim, kHeadDim == 128 ? 2 : 4> {  // 128 KB
  using Base = PipelineBlock<T, __half, kHeadDim, kHeadDim == 128 ? 2 : 4>;
  using KCodes = CodeTile<KFormat, kHeadDim, Base::kKeys, Base::kProducers>;
  using VCodes = CodeTile<VFormat, kHeadDim, Base::kKeys, Base::kProducers>;
  static constexpr int kScales = 3;  // factor of the logit, log2 of the scale of the value, 1 / that scale
  static constexpr int kScaleBytes = Base::kStages * kScales * Base::kKeys * 4;
  // A piece of the ring: codes of the keys or of the values of a step; with those of keys come both scales.
  static constexpr int kCodeBytes = KCodes::kBytes > VCodes::kBytes ? KCodes::kBytes : VCodes::kBytes;
  static constexpr int kPieceBytes = kCodeBytes + 2 * Base::kKeys * 4;
  // All but one under way: 32 to 48 KB a multiprocessor, what saturates the memory beside what is being multiplied.
  static constexpr int kPieces = kCodeBytes > 8192 ? 3 : 6;
  static constexpr int kScalesAt = Base::kStagesEnd;
  static constexpr int kPiecesAt = kScalesAt + kScaleBytes;
  static constexpr int kSharedBytes = kPiecesAt + kPieces * kPieceBytes;
  static_assert(kSharedBytes <= 226 * 1024 - 2048, "with what the kernel declares itself");
};

template <class Block>
struct CodeKeys {
  const float* scales;   // [stages][kScales][keys], in shared memory
  const float* factors;  // [rows], in shared memory: take logits of a row to base 2

  template <bool kMasked>
  __device__ __forceinline__ bool weigh(PrefillState<Block>& state, typename Block::Scores& scores,
                                        const QueryTile& tile, int step, int stage,
                                        float (&rescale)[Block::kRowTiles][2]) const {
    constexpr int kKeys = Block::kKeys;
    const float row_factors[2] = {factors[lane_row<Block>(0, 0)], factors[lane_row<Block>(0, 1)]};
    const float* of_key = scales + stage * Block::kScales * kKeys + threadIdx.x % 4 * 2;
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
      const float2 factor = *reinterpret_cast<const float2*>(of_key + n * 8);
      const float2 shift = *reinterpret_cast<const float2*>(of_key + kKeys + n * 8);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float* pair = &scores[0][n][half * 2];
        pair[0] = fmaf(pair[0] * row_factors[half], factor.x, shift.x);
        pair[1] = fmaf(pair[1] * row_factors[half], factor.y, shift.y);
      }
    }
    if constexpr (kMasked) mask_scores<Block>(scores, tile, step * kKeys);
    float base[2], sum[2] = {0.0f, 0.0f};
    bool changed = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = state.top[0][half];
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
        top = fmaxf(top, fmaxf(scores[0][n][half * 2], scores[0][n][half * 2 + 1]));
      }
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
      const float high = top == -INFINITY ? 0.0f : top;  // as in prefill::weigh
      const auto decay = attend::Decay<true>::by(state.top[0][half] - high);
      changed |= state.top[0][half] != top;
      state.top[0][half] = top;
      state.sum[0][half] = decay.of_sum(state.sum[0][half]);
      rescale[0][half] = decay.whole;
      base[half] = high - attend::kLift;
    }
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
      const float2 inverse = *reinterpret_cast<const float2*>(of_key + 2 * kKeys + n * 8);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float* pair = &scores[0][n][half * 2];
        pair[0] = exp2_approx(pair[0] - base[half]);
        pair[1] = exp2_approx(pair[1] - base[half]);
        sum[half] += pair[0] * inverse.x + pair[1] * inverse.y;
      }
    }
    state.sum[0][0] += sum[0], state.sum[0][1] += sum[1];
    return changed;
  }

  // What output and sum are relative to.
  __device__ __forceinline__ void finish(PrefillState<Block>& state) const {
    state.top[0][0] -= attend::kLift, state.top[0][1] -= attend::kLift;
  }
};

// Queries as float16, each row times a power of two that takes its largest element to 2^13 .. 2^14, as those of the
// decode kernels (codes/queries.cuh), and what takes logits of the row to base 2, `factors` [rows]. A warp brings the
// rows that it owns.
template <class Block>
__device__ __forceinline__ void bring_scaled_queries(const AttentionParams& p, const QueryTile& tile,
                                                     unsigned char* shared, float* factors) {
  using T = typename Block::Element;
  constexpr int kAtOnce = 32 / Block::kChunks;  // rows
  const int lane = threadIdx.x % 32, chunk = lane % Block::kChunks;
  const T* q = static_cast<const T*>(p.q) + tile.batch * p.q_stride.batch + chunk * 8;
#pragma unroll 2
  for (int i = 0; i < 16; i += kAtOnce) {
    const int row = threadIdx.x / 32 * 16 + i + lane / Block::kChunks, column = tile.column(row);
    uint4 x = make_uint4(0, 0, 0, 0);
    if (column >= tile.pad && column < p.q_len) {
      x = *reinterpret_cast<const uint4*>(q + tile.head(row) * p.q_stride.head + column * p.q_stride.token);
    }
    uint32_t word[4] = {x.x, x.y, x.z, x.w}, amax = 0;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float2 two = unpack2<T>(word[k]);
      amax = max(amax, max(float_bits(two.x) & 0x7fffffffu, float_bits(two.y) & 0x7fffffffu));
    }
#pragma unroll
    for (int other = 1; other < Block::kChunks; other *= 2) {
      amax = max(amax, __shfl_xor_sync(0xffffffffu, amax, other));
    }
    const uint32_t exponent = max(amax >> 23, 14u);
    const float up = bits_float((267u - exponent) << 23), down = bits_float((exponent - 13u) << 23);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float2 two = unpack2<T>(word[k]);
      word[k] = pack2<__half>(two.x * up, two.y * up);
    }
    *reinterpret_cast<uint4*>(shared + Block::query_offset(row, chunk)) =
        make_uint4(word[0], word[1], word[2], word[3]);
    // What is not finite must not end as a weight of zero: the result is NaN.
    const float back = p.scale * attend::kLog2e * down;
    if (chunk == 0) factors[row] = amax >= 0x7f800000u || fabsf(back) == INFINITY ? NAN : back;
  }
  fence_proxy_async();
  warpgroup_barrier();
}

// The producers.
template <class Block, class Barriers>
__device__ __forceinline__ void bring_codes(const PipelineParams& p, const QueryTile& tile, const StepRange& steps,
                                            Barriers& barriers, unsigned char* shared) {
  constexpr int kPieces = Block::kPieces, kKeys = Block::kKeys;
  const int thread = threadIdx.x - Block::kThreads;
  // A full cache: key `number` is in slot `number`. What has found no slot is not attended.
  const int count = min(tile.keys.count, p.slots);
  const auto vectors = [&](const void* cache, const Strides& stride) {
    return static_cast<const char*>(cache) + tile.cache_row * stride.batch + tile.cache_head * stride.head;
  };
  const auto scales = [&](const KvStore& store) {
    return store.scale + tile.cache_row * store.scale_stride.batch + tile.cache_head * store.scale_stride.head;
  };
  const char *k = vectors(p.k_cache, p.k_cache_stride), *v = vectors(p.v_cache, p.v_cache_stride);
  const float *k_scale = scales(p.k_store), *v_scale = scales(p.v_store);
  unsigned char* pieces = shared + Block::kPiecesAt;
  const auto copied_scale = [&](int piece, int which) {
    return reinterpret_cast<float*>(pieces + piece * Block::kPieceBytes + Block::kCodeBytes) + which * kKeys + thread;
  };

  // Piece i is the keys, i + 1 the values of step begin + i / 2. A thread copies what it will widen, so that only it
  // waits.
  const auto load = [&](int i, int piece) {
    const int number = (steps.begin + i / 2) * kKeys, key = number + thread;
    if (i < 2 * (steps.end - steps.begin)) {
      const uint32_t codes = shared_address(pieces + piece * Block::kPieceBytes);
      if (i % 2 == 0) {
        Block::KCodes::load(k, p.k_cache_stride.token, number, count, codes, thread);
        const bool valid = key < count;
        cp_async_4(shared_address(copied_scale(piece, 0)), k_scale + (valid ? key : 0) * p.k_store.scale_stride.token,
                   valid);
        cp_async_4(shared_address(copied_scale(piece, 1)), v_scale + (valid ? key : 0) * p.v_store.scale_stride.token,
                   valid);
      } else {
        Block::VCodes::load(v, p.v_cache_stride.token, number, count, codes, thread);
      }
    }
    cp_async_commit();
  };
  StageCursor<Block::kStages> cursor;
  int piece = 0, i = 0;
  // widen(codes): of this thread's part of the piece that comes next, into a stage that is empty.
  const auto bring = [&](uint64_t& full, uint64_t& empty, const auto& widen) {
    cp_async_wait<kPieces - 1>();
    barrier_wait(shared_address(&empty), cursor.parity ^ 1);  // of the first round: see barrier_wait
    widen(pieces + piece * Block::kPieceBytes);
    fence_proxy_async();
    warpgroup_barrier();
    if (thread == 0) barrier_arrive(shared_address(&full));
    load(i + kPieces, piece);
    ++i;
    if (++piece == kPieces) piece = 0;
  };
#pragma unroll 1
  for (int ahead = 0; ahead < kPieces; ++ahead) load(ahead, ahead);
#pragma unroll 1
  for (int step = steps.begin; step < steps.end; ++step, cursor.advance()) {
    unsigned char* stage = shared + Block::kQueryBytes + cursor.stage * Block::kStageBytes;
    bring(barriers.k_full[cursor.stage], barriers.k_empty[cursor.stage], [&](const unsigned char* codes) {
      Block::KCodes::widen(codes, stage, thread);
      const float of_value = *copied_scale(piece, 1);
      float* to = reinterpret_cast<float*>(shared + Block::kScalesAt) + cursor.stage * Block::kScales * kKeys + thread;
      to[0] = *copied_scale(piece, 0);
      // A scale of zero means that there is no key, and a weight of zero. No other scale is below 2^-90.
      to[kKeys] = log2_approx(of_value);
      to[2 * kKeys] = reciprocal_approx(fmaxf(of_value, 0x1p-100f));
    });
    bring(barriers.v_full[cursor.stage], barriers.v_empty[cursor.stage],
          [&](const unsigned char* codes) { Block::VCodes::widen(codes, stage + Block::kKeyBytes, thread); });
  }
  cp_async_wait<0>();
}

// Grid: see pipeline_config. Two warpgroups own rows, the third brings keys and values.
template <class Block>
__global__ void __launch_bounds__(Block::kBlockThreads, 1)
    pipeline_codes_kernel(const __grid_constant__ PipelineParams p) {
  extern __shared__ __align__(Block::kAlignment) unsigned char shared[];
  using Barriers = PipelineBarriers<Block::kStages>;
  __shared__ Barriers barriers;
  __shared__ QueryTile tile;
  __shared__ float factors[Block::kRows];
  if (threadIdx.x == 0) tile = QueryTile::of_block(p, Block::kRows);
  if (threadIdx.x == Block::kThreads) barriers.init(Block::kThreads / 32);
  __syncthreads();
  const StepRange steps = StepRange::of(tile.keys, blockIdx.y, gridDim.y);
  if (threadIdx.x >= Block::kThreads) {
    give_registers<40>();
    bring_codes<Block>(p, tile, steps, barriers, shared);
  } else {
    take_registers<232>();
    bring_scaled_queries<Block>(p, tile, shared, factors);
    const CodeKeys<Block> keys = {reinterpret_cast<const float*>(shared + Block::kScalesAt), factors};
    own_rows<Block>(p, tile, steps, barriers, keys, shared);
  }
}

// Instantiated by one file per pair of formats. The new tokens are in the cache already.
template <class KFormat, class VFormat>
void launch_prefill_codes(const AttentionParams& a, const PrefillPlan& plan, void* stream) {
  dispatch_head_dim(a.head_dim, [&](auto head_dim) {
    constexpr int kHeadDim = decltype(head_dim)::value;
    if constexpr (kHeadDim == 64 || kHeadDim == 128) {
      dispatch_bool(a.dtype == DType::kBFloat16, [&](auto bf16) {
        using T = std::conditional_t<decltype(bf16)::value, __nv_bfloat16, __half>;
        using Block = CodeBlock<T, KFormat, VFormat, kHeadDim>;
        PipelineParams p = {};
        static_cast<AttentionParams&>(p) = a;
        p.splits = plan.splits;
        launch(pipeline_codes_kernel<Block>, pipeline_config<Block>(plan, Block::kSharedBytes), p, stream);
        launch_merge_parts<T, true>(a, plan, stream);
      });
    }
  });
}

}  // namespace zigzag::prefill
