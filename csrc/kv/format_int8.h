// int8: one byte per element, two's complement, torch.int8.
//
//     byte d    code of element d, -127 .. 127
#pragma once

#include <type_traits>

#include "core/types.h"
#include "kv/code_bits.h"

#if defined(__CUDACC__)
#include "device/ptx.cuh"
#endif

namespace zigzag {

struct Int8 {
  static constexpr KvFormat kFormat = KvFormat::kInt8;
  static constexpr int kBits = 8;
  static constexpr float kMaxCode = 127.0f;

  ZZ_HOST_DEVICE static uint32_t encode(float y) { return static_cast<uint32_t>(nearest_integer(y)) & 0xffu; }
  ZZ_HOST_DEVICE static float decode(uint32_t code) { return static_cast<float>(static_cast<int8_t>(code)); }

#if defined(__CUDACC__)
  // Two codes, each in both bytes of its half of x, as two elements: exact. An integer in the low mantissa bits of a
  // power of two is that power plus the integer; bfloat16 has room for seven bits, so the sign takes its own way.
  template <class Element>
  __device__ __forceinline__ static uint32_t widen2(uint32_t x) {
    if constexpr (std::is_same_v<Element, __half>) {
      const uint32_t shifted = ((x & 0x00ff00ffu) ^ 0x00800080u) | 0x64006400u;  // 1024 + code + 128
      return device::fma2<Element>(shifted, 0x3c003c00u, 0xe480e480u);           // * 1 - 1152
    } else {
      const uint32_t low = (x & 0x007f007fu) | 0x43004300u, sign = (x & 0x00800080u) | 0x43004300u;  // sign: 128 or 256
      return device::fma2<Element>(sign, 0xbf80bf80u, low);                                          // low - sign
    }
  }
#endif
};

}  // namespace zigzag
