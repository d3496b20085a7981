// fp8: float8 e4m3fn, one byte per element, torch.float8_e4m3fn.
//
//     byte d       7    6 5 4 3    2 1 0          value  2^(exponent - 7) * 1.mantissa, exponent 0: 2^-6 * 0.mantissa
//                sign  exponent  mantissa         largest 448 = 0x7e; 0x7f and 0xff are NaN and never written
#pragma once

#include "core/types.h"
#include "kv/code_bits.h"

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
};

}  // namespace zigzag
