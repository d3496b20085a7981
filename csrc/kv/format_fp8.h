// fp8: float8 e4m3fn, one byte per element, torch.float8_e4m3fn.
//
//     byte d       7    6 5 4 3    2 1 0          value  2^(exponent - 7) * 1.mantissa, exponent 0: 2^-6 * 0.mantissa
//                sign  exponent  mantissa         largest 448 = 0x7e; 0x7f and 0xff are NaN and never written
#pragma once

#include <type_traits>

#include "core/types.h"
#include "kv/code_bits.h"

#if defined(__CUDACC__)
#include "device/ptx.cuh"
#endif

namespace zigzag {

struct Fp8 {
  static constexpr KvFormat kFormat = KvFormat::kFp8;
  static constexpr int kBits = 8;
  static constexpr float kMaxCode = 448.0f;

  // |y| <= 448 up to rounding.
  ZZ_HOST_DEVICE static uint32_t encode(float y) {
    constexpr uint32_t kBias = 120u << 23, kSmallestNormal = 121u << 23, kStep = 141u << 23;  // 2^14: floats 2^-9 apart
    const uint32_t bits = float_bits(y), magnitude = bits & 0x7fffffffu;
    const uint32_t normal = (magnitude + 0x7ffffu + ((magnitude >> 20) & 1u) - kBias) >> 20;
    const uint32_t subnormal = float_bits(bits_float(magnitude) + 16384.0f) - kStep;
    return (bits >> 24 & 0x80u) | (magnitude < kSmallestNormal ? subnormal : normal);
  }

  ZZ_HOST_DEVICE static float decode(uint32_t code) {
    const uint32_t magnitude = code & 0x7fu;
    const float subnormal = bits_float(magnitude + (141u << 23)) - 16384.0f;
    const float normal = bits_float((magnitude << 20) + (120u << 23));
    return bits_float(float_bits(magnitude < 8 ? subnormal : normal) | (code & 0x80u) << 24);
  }

#if defined(__CUDACC__)
  // Two codes, each in both bytes of its half of x, as two elements: exact. The exponent lands in its field with the
  // wrong bias, which one multiplication corrects, for subnormal codes too.
  template <class Element>
  __device__ __forceinline__ static uint32_t widen2(uint32_t x) {
    constexpr bool kHalf = std::is_same_v<Element, __half>;
    constexpr uint32_t kShift = kHalf ? 1 : 4, kMagnitude = kHalf ? 0x3f803f80u : 0x07f007f0u;
    constexpr uint32_t kFactor = kHalf ? 0x5c005c00u : 0x7b807b80u;  // 2^8 and 2^120
    const uint32_t moved = (x & 0x80008000u) | ((x >> kShift) & kMagnitude);
    return device::fma2<Element>(moved, kFactor, 0x80008000u);
  }
#endif
};

}  // namespace zigzag
