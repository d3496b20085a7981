// int4: two elements per byte, torch.uint8 with head_dim / 2 bytes per vector.
//
//     byte i     7 6 5 4          3 2 1 0
//              element 2i + 1   element 2i        a nibble holds code + 8; codes are -7 .. 7
#pragma once

#include <type_traits>

#include "core/types.h"
#include "kv/code_bits.h"

#if defined(__CUDACC__)
#include "device/ptx.cuh"
#endif

namespace zigzag {

struct Int4 {
  static constexpr KvFormat kFormat = KvFormat::kInt4;
  static constexpr int kBits = 4;
  static constexpr float kMaxCode = 7.0f;

  ZZ_HOST_DEVICE static uint32_t encode(float y) { return static_cast<uint32_t>(nearest_integer(y) + 8); }
  ZZ_HOST_DEVICE static float decode(uint32_t nibble) { return static_cast<float>(static_cast<int>(nibble) - 8); }

#if defined(__CUDACC__)
  // The codes in the low nibbles of the halves of x as two elements: exact. A nibble in the low mantissa bits of a
  // power of two is that power plus the nibble.
  template <class Element>
  __device__ __forceinline__ static uint32_t widen2(uint32_t x) {
    constexpr bool kHalf = std::is_same_v<Element, __half>;
    const uint32_t shifted = (x & 0x000f000fu) | (kHalf ? 0x64006400u : 0x43004300u);  // 1024 or 128, + 8 + code
    return device::fma2<Element>(shifted, kHalf ? 0x3c003c00u : 0x3f803f80u, kHalf ? 0xe408e408u : 0xc308c308u);
  }
#endif
};

}  // namespace zigzag
