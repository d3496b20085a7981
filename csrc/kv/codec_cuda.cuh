// Codes to operands of the tensor cores, and vectors to codes, for every format, by one warp.
#pragma once

#include "device/ptx.cuh"
#include "kv/formats.h"

namespace zigzag {

// Codes of four neighbouring elements, as they lie in memory.
template <class Format>
using Quad = std::conditional_t<Format::kBits == 8, uint32_t, uint16_t>;

// Four codes of one vector as two registers of two elements each; element_pairs() says which. Exact.
template <class Format, class Element>
__device__ __forceinline__ void widen_quad(uint32_t quad, uint32_t& first, uint32_t& second) {
  const uint32_t low = __byte_perm(quad, 0, 0x1100);  // bytes 0 and 1, each twice
  if constexpr (Format::kBits == 8) {
    first = Format::template widen2<Element>(low);
    second = Format::template widen2<Element>(__byte_perm(quad, 0, 0x3322));
  } else {
    first = Format::template widen2<Element>(low);
    second = Format::template widen2<Element>(low >> 4);
  }
}

// Elements 0 .. 3 of a row in the order in which widen_quad delivers them: two registers of two elements, from
// registers that hold (0, 1) and (2, 3).
template <class Format>
__device__ __forceinline__ void element_pairs(uint2 row, uint32_t& first, uint32_t& second) {
  if constexpr (Format::kBits == 8) {
    first = row.x, second = row.y;  // (0, 1), (2, 3)
  } else {
    first = __byte_perm(row.x, row.y, 0x5410), second = __byte_perm(row.x, row.y, 0x7632);  // (0, 2), (1, 3)
  }
}

// Code `i` of two vectors, whose quads are x and y, as one register of two elements (of x, of y). Exact.
template <class Format, class Element, int i>
__device__ __forceinline__ uint32_t widen_across(uint32_t x, uint32_t y) {
  if constexpr (Format::kBits == 8) {
    return Format::template widen2<Element>(__byte_perm(x, y, 0x4400 + 0x1111 * i));
  } else {
    return Format::template widen2<Element>((x | y << 16) >> (4 * i));
  }
}

// One vector spread over a warp, eight elements a lane in two quads; lanes without elements hold zeros.
template <class Format>
struct EncodedPiece {
  Quad<Format> low, high;
  float scale;  // of the vector, the same in all lanes

  template <class Element>
  __device__ __forceinline__ static EncodedPiece encode(uint4 piece) {
    const uint32_t word[4] = {piece.x, piece.y, piece.z, piece.w};
    float x[8];
    uint32_t amax = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 two = device::unpack2<Element>(word[i]);
      x[2 * i] = two.x, x[2 * i + 1] = two.y;
      amax = max(amax, max(float_bits(two.x) & 0x7fffffffu, float_bits(two.y) & 0x7fffffffu));
    }
    const VectorScale scale(__reduce_max_sync(0xffffffffu, amax), Format::kMaxCode);
    EncodedPiece encoded = {0, 0, scale.scale};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      encoded.low |= Format::encode(scale.scaled(x[i])) << (i * Format::kBits);
      encoded.high |= Format::encode(scale.scaled(x[4 + i])) << (i * Format::kBits);
    }
    return encoded;
  }
};

}  // namespace zigzag
