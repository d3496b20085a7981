// What the quantised formats share: the scale of a vector, and arithmetic that gives the same bits on every machine.
//
// A vector x of head_dim elements becomes codes and one float32 scale, x[d] ~ code[d] * scale, with no zero point:
//
//     scale = amax / max_code        code[d] = nearest(x[d] * (max_code / amax))        amax = max |x[d]|
//
// in float32, every operation rounded to nearest even. A vector below 2^-80 becomes zeros of scale 2^-24, which is
// near the scales of usual vectors: no scale is ever zero or subnormal, so that 1 / scale and log2(scale) exist and lie
// among those of the other tokens. A vector with an infinity or a NaN becomes zeros of scale
// infinity, whose product is NaN: what was not a number stays visible.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "kv/ring.h"

namespace zigzag {

ZZ_HOST_DEVICE uint32_t float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

ZZ_HOST_DEVICE float bits_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

// Nearest integer, ties to even, of |y| < 2^22: adding 1.5 * 2^23 leaves no bits for a fraction.
ZZ_HOST_DEVICE int nearest_integer(float y) { return static_cast<int>(float_bits(y + 12582912.0f) - 0x4b400000u); }

struct VectorScale {
  float scale;    // stored with the codes
  float inverse;  // factor on the elements before rounding; 0: all codes are those of 0

  // Bits of the largest |element|, and the largest code of the format. Bits, since they order NaN above infinity.
  ZZ_HOST_DEVICE VectorScale(uint32_t amax_bits, float max_code) {
    constexpr uint32_t kInfinity = 0x7f800000u, kSmallest = (127u - 80u) << 23;
    const bool finite = amax_bits < kInfinity, zero = amax_bits < kSmallest;
    const float amax = bits_float(finite && !zero ? amax_bits : 0x3f800000u);
#if defined(__CUDA_ARCH__)
    const float quotient = __fdiv_rn(amax, max_code), reciprocal = __fdiv_rn(max_code, amax);
#else
    const float quotient = amax / max_code, reciprocal = max_code / amax;
#endif
    scale = !finite ? bits_float(kInfinity) : zero ? 0x1p-24f : quotient;
    inverse = finite && !zero ? reciprocal : 0.0f;
  }

  // The number to round to a code, itself rounded to float32: the caller keeps a compiler from fusing it with what
  // follows (the intrinsic does so on a GPU).
  ZZ_HOST_DEVICE float scaled(float x) const {
#if defined(__CUDA_ARCH__)
    const float y = __fmul_rn(x, inverse);
#else
    const float y = x * inverse;
#endif
    return inverse == 0.0f ? 0.0f : y;
  }
};

}  // namespace zigzag
