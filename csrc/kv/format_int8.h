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
};

}  // namespace zigzag
