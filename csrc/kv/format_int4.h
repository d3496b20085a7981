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
};

}  // namespace zigzag
