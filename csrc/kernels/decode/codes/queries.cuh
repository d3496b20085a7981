// The query rows of segments.cuh: float16, in the order in which the codes of keys come.
#pragma once

#include "kernels/decode/segments.cuh"
#include "kv/code_bits.h"

namespace zigzag::attend {

// Query rows as float16 in the order of the keys' codes: B fragments of Q^T.
template <class S>
struct CodeQueries {
  using Format = typename S::KTile::Format;
  static constexpr int kCodes = 32 / Format::kBits;  // in a register
  static constexpr int kPieceSteps = kCodes / 4;
  uint32_t fragment[S::kSteps][S::kRowTiles][2];
  float bias[S::kRowTiles][2];    // what the logits of rows 2t, 2t + 1 start from
  float factor[S::kRowTiles][2];  // of the same rows: takes units out of logits, and to base 2

  // `rows` are as stage_queries() leaves them.
  __device__ __forceinline__ void attach(const char* rows, float scale_log2) {
#pragma unroll
    for (int n = 0; n < S::kRowTiles; ++n) attach(rows, scale_log2, n);
  }

 private:
  // Element e of this lane in piece `piece` of row 8 n + g.
  __device__ __forceinline__ static void read(const char* rows, int n, int piece, float (&x)[kCodes]) {
    const int row = 8 * n + threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < kCodes; i += 4) {
      const int byte = 2 * (4 * kCodes * piece + kCodes * t + i);
      const uint2 quad = *reinterpret_cast<const uint2*>(rows + swizzled(row, byte / 16, S::kRowBytes) + byte % 16);
      const float2 low = cuda::unpack2<typename S::Element>(quad.x);
      const float2 high = cuda::unpack2<typename S::Element>(quad.y);
      x[i] = low.x, x[i + 1] = low.y, x[i + 2] = high.x, x[i + 3] = high.y;
    }
  }

  __device__ __forceinline__ void attach(const char* rows, float scale_log2, int n) {
    uint32_t amax = 0;
    float x[kCodes];
#pragma unroll
    for (int piece = 0; piece < S::KTile::kChunks; ++piece) {
      read(rows, n, piece, x);
#pragma unroll
      for (int i = 0; i < kCodes; ++i) amax = max(amax, float_bits(x[i]) & 0x7fffffffu);
    }
    amax = max(amax, __shfl_xor_sync(0xffffffffu, amax, 1));
    amax = max(amax, __shfl_xor_sync(0xffffffffu, amax, 2));
    // The power of two that takes the largest magnitude to 2^13 .. 2^14, or nearly so where it is tiny. All but
    // elements 2^-30 times as large or less then keep the bits of a bfloat16.
    const uint32_t exponent = max(amax >> 23, 14u);
    const float up = bits_float((267u - exponent) << 23), down = bits_float((exponent - 13u) << 23);
    float offset = 0.f;  // sum of elements times offsets, in units of 2^-24
#pragma unroll
    for (int piece = 0; piece < S::KTile::kChunks; ++piece) {
      read(rows, n, piece, x);
#pragma unroll
      for (int i = 0; i < kCodes / 2; ++i) {
        const int e = Format::kApart == 1 ? 2 * i : i;
        const float scale = up * (Format::unit(0) / Format::unit(i));
        const uint32_t pair = cuda::pack2<__half>(x[e] * scale, x[e + Format::kApart] * scale);
        const float2 rounded = cuda::unpack2<__half>(pair);
        offset += static_cast<float>(Format::offset(i)) * (rounded.x + rounded.y);
        fragment[piece * kPieceSteps + i / 2][n][i % 2] = pair;
      }
    }
    offset += __shfl_xor_sync(0xffffffffu, offset, 1);
    offset += __shfl_xor_sync(0xffffffffu, offset, 2);
    // What is not finite must not end as a weight of zero. Over integers that includes queries from magnitudes of
    // 2^116 / (scale of the logits) on: the result is NaN.
    float back = scale_log2 * down * (1.0f / Format::unit(0));
    if (amax >= 0x7f800000u || fabsf(back) == INFINITY) back = NAN;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int lane = 4 * (2 * (threadIdx.x % 4) + e);
      bias[n][e] = -0x1p-24f * __shfl_sync(0xffffffffu, offset, lane);
      factor[n][e] = __shfl_sync(0xffffffffu, back, lane);
    }
  }
};

}  // namespace zigzag::attend
