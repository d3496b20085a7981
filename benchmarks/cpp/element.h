// Host access to float32, float16 and bfloat16 elements, for filling buffers and for the reference. Clear, not fast.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/types.h"

namespace zigzag::bench {

inline uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float bits_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Round to nearest even; the benchmarks' inputs are finite.
inline uint16_t to_bfloat16(float value) {
  const uint32_t bits = float_bits(value);
  return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

inline float from_bfloat16(uint16_t bits) { return bits_float(static_cast<uint32_t>(bits) << 16); }

// Finite values inside the normal range of float16 round to nearest even, smaller ones become zero.
inline uint16_t to_float16(float value) {
  const uint32_t bits = float_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000;
  const uint32_t magnitude = bits & 0x7FFFFFFF;
  if (magnitude < 0x38800000) return static_cast<uint16_t>(sign);
  const uint32_t rounded = magnitude - 0x38000000 + 0xFFF + ((magnitude >> 13) & 1);
  return static_cast<uint16_t>(sign | (rounded >> 13));
}

inline float from_float16(uint16_t bits) {
  const int exponent = (bits >> 10) & 0x1F;
  const int mantissa = bits & 0x3FF;
  const float magnitude = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                                        : std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
  return bits & 0x8000 ? -magnitude : magnitude;
}

inline float load_element(const void* data, int64_t index, DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return static_cast<const float*>(data)[index];
    case DType::kFloat16: return from_float16(static_cast<const uint16_t*>(data)[index]);
    case DType::kBFloat16: return from_bfloat16(static_cast<const uint16_t*>(data)[index]);
  }
  return 0;
}

inline void store_element(void* data, int64_t index, DType dtype, float value) {
  switch (dtype) {
    case DType::kFloat32: static_cast<float*>(data)[index] = value; break;
    case DType::kFloat16: static_cast<uint16_t*>(data)[index] = to_float16(value); break;
    case DType::kBFloat16: static_cast<uint16_t*>(data)[index] = to_bfloat16(value); break;
  }
}

}  // namespace zigzag::bench
