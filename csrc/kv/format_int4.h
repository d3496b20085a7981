// int4: two elements per byte, torch.uint8 with head_dim / 2 bytes per vector.
//
//     byte i     7 6 5 4          3 2 1 0
//              element 2i + 1   element 2i        a nibble holds code + 8; codes are -7 .. 7
#pragma once

#include "core/types.h"
#include "kv/code_bits.h"

namespace zigzag {

struct Int4 {
  static constexpr KvFormat kFormat = KvFormat::kInt4;
  static constexpr int kBits = 4;
  static constexpr float kMaxCode = 7.0f;

  ZZ_HOST_DEVICE static uint32_t encode(float y) { return static_cast<uint32_t>(nearest_integer(y) + 8); }
  ZZ_HOST_DEVICE static float decode(uint32_t nibble) { return static_cast<float>(static_cast<int>(nibble) - 8); }

#if defined(__CUDACC__)
  // As float16 operands: see formats.h. A nibble alone in its half is a subnormal, an integer times 2^-24; one left in
  // place, 4 bits higher, is 16 times that.
  __device__ static constexpr float unit(int i) { return i % 2 == 0 ? 0x1p-24f : 0x1p-20f; }
  __device__ static constexpr uint32_t offset(int i) { return i % 2 == 0 ? 0x08 : 0x80; }
  static constexpr int kApart = 4;

  __device__ __forceinline__ static void widen_row(uint32_t codes, uint32_t (&pair)[4]) {
    pair[0] = codes & 0x000f000fu, pair[1] = codes & 0x00f000f0u;
    pair[2] = codes >> 8 & 0x000f000fu, pair[3] = codes >> 8 & 0x00f000f0u;
  }
  __device__ __forceinline__ static void widen_columns(uint32_t codes, uint32_t (&pair)[4]) { widen_row(codes, pair); }
#endif
};

}  // namespace zigzag
