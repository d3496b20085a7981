// fp8: float8 e4m3fn, one byte per element, torch.float8_e4m3fn.
//
//     byte d       7    6 5 4 3    2 1 0          value  2^(exponent - 7) * 1.mantissa, exponent 0: 2^-6 * 0.mantissa
//                sign  exponent  mantissa         largest 448 = 0x7e; 0x7f and 0xff are NaN and never written
#pragma once

#include "core/types.h"
#include "kv/code_bits.h"

#if defined(__CUDACC__)
#include "cuda/ptx.cuh"
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

  // Bits of the float16 that is 1 / kHalfScale of the code's value: exponent and mantissa in their fields.
  ZZ_HOST_DEVICE static uint16_t scaled_half(uint32_t code) {
    return static_cast<uint16_t>((code & 0x80u) << 8 | (code & 0x7fu) << 7);
  }
  static constexpr float kHalfScale = 256.0f;

#if defined(__CUDACC__)
  // As float16 operands: see formats.h.
  __device__ static constexpr uint32_t offset(int) { return 0; }
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 890
  __device__ static constexpr float unit(int) { return 1.0f; }
  static constexpr int kApart = 1;

  __device__ __forceinline__ static void widen_row(uint32_t codes, uint32_t (&pair)[2]) {
    cuda::widen_e4m3(codes, pair[0], pair[1]);
  }
  __device__ __forceinline__ static void widen_columns(uint32_t codes, uint32_t (&pair)[2]) {
    widen_row(__byte_perm(codes, 0, 0x3120), pair);
  }
#else
  // Exponent and mantissa land in their fields with a bias that is 8 too small, those of subnormal codes too.
  __device__ static constexpr float unit(int) { return 0x1p-8f; }
  static constexpr int kApart = 2;

  __device__ __forceinline__ static void widen_row(uint32_t codes, uint32_t (&pair)[2]) {
    pair[0] = moved(codes << 8), pair[1] = moved(codes);
  }
  __device__ __forceinline__ static void widen_columns(uint32_t codes, uint32_t (&pair)[2]) { widen_row(codes, pair); }

  // The codes in the high bytes of the halves of x.
  __device__ __forceinline__ static uint32_t moved(uint32_t x) { return (x & 0x80008000u) | (x >> 1 & 0x3f803f80u); }
#endif
#endif
};

}  // namespace zigzag
