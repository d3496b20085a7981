// int8: one byte per element, two's complement, torch.int8.
//
//     byte d    code of element d, -127 .. 127
#pragma once

#include "core/types.h"
#include "kv/code_bits.h"

namespace zigzag {

struct Int8 {
  static constexpr KvFormat kFormat = KvFormat::kInt8;
  static constexpr int kBits = 8;
  static constexpr float kMaxCode = 127.0f;

  ZZ_HOST_DEVICE static uint32_t encode(float y) { return static_cast<uint32_t>(nearest_integer(y)) & 0xffu; }
  ZZ_HOST_DEVICE static float decode(uint32_t code) { return static_cast<float>(static_cast<int8_t>(code)); }

#if defined(__CUDACC__)
  // As float16 operands: see formats.h. A byte alone in its half is a subnormal, an integer times 2^-24.
  __device__ static constexpr float unit(int) { return 0x1p-24f; }
  __device__ static constexpr uint32_t offset(int) { return 128; }
  static constexpr int kApart = 2;

  __device__ __forceinline__ static void widen_row(uint32_t codes, uint32_t (&pair)[2]) {
    const uint32_t shifted = codes ^ 0x80808080u;
    pair[0] = shifted & 0x00ff00ffu, pair[1] = __byte_perm(shifted, 0, 0x4341);
  }
  __device__ __forceinline__ static void widen_columns(uint32_t codes, uint32_t (&pair)[2]) { widen_row(codes, pair); }
#endif
};

}  // namespace zigzag
