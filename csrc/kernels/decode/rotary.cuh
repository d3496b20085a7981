// RoPE inside the decode kernels: queries turn on their way into shared memory, new keys wherever they are used.
//
// A row is handled in pairs of quads (4 elements, 8 bytes): quad i of the first half of the rotary dims with quad i of
// the second, which is what it turns with; dims past them pass through, two neighbouring quads a pair. So 8 elements
// are a pair whether anything turns or not, and without RoPE a pair is 16 bytes of the row.
#pragma once

#include "core/params.h"
#include "cuda/ptx.cuh"

namespace zigzag::attend {

// Where the two quads of a pair lie in their row, of which the first `turning` pairs turn.
struct QuadPair {
  int low, high;
};

__device__ __forceinline__ QuadPair quads_of(int pair, int turning) {
  return pair < turning ? QuadPair{pair, turning + pair} : QuadPair{2 * pair, 2 * pair + 1};
}

// Pairs of a row that turn; 0 without RoPE.
__device__ __forceinline__ int turning_pairs(const AttentionParams& p) { return p.rotary.dim / 8; }

// Both quads of a pair in one register quadruple: the low one in x, y.
__device__ __forceinline__ uint4 load_pair(const char* row, QuadPair quads) {
  const uint2 low = *reinterpret_cast<const uint2*>(row + 8 * quads.low);
  const uint2 high = *reinterpret_cast<const uint2*>(row + 8 * quads.high);
  return make_uint4(low.x, low.y, high.x, high.y);
}

__device__ __forceinline__ void store_pair(char* row, QuadPair quads, uint4 pair) {
  *reinterpret_cast<uint2*>(row + 8 * quads.low) = make_uint2(pair.x, pair.y);
  *reinterpret_cast<uint2*>(row + 8 * quads.high) = make_uint2(pair.z, pair.w);
}

// Cosines and sines of one pair at one position. Kept as they were loaded, so that nothing waits for them before they
// are used.
template <class Element>
struct Turn {
  uint4 cos[2], sin[2];  // of the low quad, of the high one: 4 float32, or 4 elements in x, y

  __device__ __forceinline__ void load(const AttentionParams& p, int batch, int column, QuadPair quads) {
    const Rotary& r = p.rotary;
    const int size = r.dtype == DType::kFloat32 ? 4 : 2;
    const char* c = static_cast<const char*>(r.cos) + size * (batch * r.cos_batch + column * r.cos_token);
    const char* s = static_cast<const char*>(r.sin) + size * (batch * r.sin_batch + column * r.sin_token);
    const int low = 4 * size * quads.low, high = 4 * size * quads.high;
    if (size == 4) {
      cos[0] = *reinterpret_cast<const uint4*>(c + low), cos[1] = *reinterpret_cast<const uint4*>(c + high);
      sin[0] = *reinterpret_cast<const uint4*>(s + low), sin[1] = *reinterpret_cast<const uint4*>(s + high);
    } else {
      cos[0] = load_half(c + low), cos[1] = load_half(c + high);
      sin[0] = load_half(s + low), sin[1] = load_half(s + high);
    }
  }

  __device__ __forceinline__ uint4 apply(const AttentionParams& p, uint4 pair) const {
    const bool wide = p.rotary.dtype == DType::kFloat32;
    const float4 low = widen(pair.x, pair.y), high = widen(pair.z, pair.w);
    const float4 cos_low = value(cos[0], wide), cos_high = value(cos[1], wide);
    const float4 sin_low = value(sin[0], wide), sin_high = value(sin[1], wide);
    return make_uint4(
        cuda::pack2<Element>(low.x * cos_low.x - high.x * sin_low.x, low.y * cos_low.y - high.y * sin_low.y),
        cuda::pack2<Element>(low.z * cos_low.z - high.z * sin_low.z, low.w * cos_low.w - high.w * sin_low.w),
        cuda::pack2<Element>(high.x * cos_high.x + low.x * sin_high.x, high.y * cos_high.y + low.y * sin_high.y),
        cuda::pack2<Element>(high.z * cos_high.z + low.z * sin_high.z, high.w * cos_high.w + low.w * sin_high.w));
  }

 private:
  __device__ __forceinline__ static uint4 load_half(const char* at) {
    const uint2 x = *reinterpret_cast<const uint2*>(at);
    return make_uint4(x.x, x.y, 0, 0);
  }
  __device__ __forceinline__ static float4 widen(uint32_t x, uint32_t y) {
    const float2 a = cuda::unpack2<Element>(x), b = cuda::unpack2<Element>(y);
    return make_float4(a.x, a.y, b.x, b.y);
  }
  __device__ __forceinline__ static float4 value(uint4 x, bool wide) {
    if (!wide) return widen(x.x, x.y);
    return make_float4(__uint_as_float(x.x), __uint_as_float(x.y), __uint_as_float(x.z), __uint_as_float(x.w));
  }
};

}  // namespace zigzag::attend
