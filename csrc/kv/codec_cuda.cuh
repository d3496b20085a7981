// Vectors to codes, for every format, by one warp.
#pragma once

#include <type_traits>

#include "cuda/ptx.cuh"
#include "kv/formats.h"

namespace zigzag {

// Codes of four neighbouring elements, as they lie in memory.
template <class Format>
using Quad = std::conditional_t<Format::kBits == 8, uint32_t, uint16_t>;

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
      const float2 two = cuda::unpack2<Element>(word[i]);
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
