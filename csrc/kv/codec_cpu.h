// Vectors to codes and codes to tiles of floats on the CPU, for every format. The loops are written for the compiler to
// vectorise: no branch, no call, elements in order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/types.h"
#include "cpu/vec.h"
#include "kv/formats.h"

namespace zigzag::ZIGZAG_CPU_ISA {

template <class Format>
inline void decode_vector(const uint8_t* codes, float scale, int head_dim, float* to) {
  if constexpr (std::is_same_v<Format, Fp8>) {  // through float16: no compiler vectorises its decode()
    Float16 halves[kMaxHeadDim];
    for (int d = 0; d < head_dim; ++d) halves[d].bits = Fp8::scaled_half(codes[d]);
    const Vec factor = Vec::fill(scale * Fp8::kHalfScale);  // exact: the largest scale is below 2^120
    for (int d = 0; d < head_dim; d += Vec::kWidth) (Vec::load(halves + d) * factor).store(to + d);
  } else if constexpr (Format::kBits == 8) {
    for (int d = 0; d < head_dim; ++d) to[d] = Format::decode(codes[d]) * scale;
  } else {
    for (int i = 0; i < head_dim / 2; ++i) {
      to[2 * i] = Format::decode(codes[i] & 15u) * scale;
      to[2 * i + 1] = Format::decode(codes[i] >> 4) * scale;
    }
  }
}

// Returns the scale.
template <class Format>
inline float encode_vector(const float* x, int head_dim, uint8_t* codes) {
  uint32_t amax = 0;
  for (int d = 0; d < head_dim; ++d) amax = std::max(amax, float_bits(x[d]) & 0x7fffffffu);
  const VectorScale scale(amax, Format::kMaxCode);
  float y[kMaxHeadDim];
  for (int d = 0; d < head_dim; ++d) y[d] = scale.scaled(x[d]);
  asm("" : "+m"(y));  // y was rounded to float32: from here the multiplication cannot be fused into what follows
  uint32_t code[kMaxHeadDim];
  for (int d = 0; d < head_dim; ++d) code[d] = Format::encode(y[d]);
  if constexpr (Format::kBits == 8) {
    for (int d = 0; d < head_dim; ++d) codes[d] = static_cast<uint8_t>(code[d]);
  } else {
    for (int i = 0; i < head_dim / 2; ++i) codes[i] = static_cast<uint8_t>(code[2 * i] | code[2 * i + 1] << 4);
  }
  return scale.scale;
}

// Writes one vector of `dtype` to a cache: its elements as they are, or its codes and their scale.
inline void store_vector(DType dtype, const void* from, int head_dim, KvFormat format, void* to, float* scale) {
  if (format == KvFormat::kPlain) {
    std::memcpy(to, from, static_cast<std::size_t>(vector_bytes(format, dtype, head_dim)));
    return;
  }
  float x[kMaxHeadDim];
  dispatch_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    for (int d = 0; d < head_dim; d += Vec::kWidth) Vec::load(static_cast<const T*>(from) + d).store(x + d);
  });
  dispatch_kv_format(
      format, [&](auto codec) { *scale = encode_vector<decltype(codec)>(x, head_dim, static_cast<uint8_t*>(to)); });
}

// Vectors of one (row b, head): plain elements or codes with scales. Strides in bytes and in floats.
struct VectorRows {
  KvFormat format;
  const char* data;
  int64_t stride;
  const float* scale;
  int64_t scale_stride;
};

// rows vectors as floats, to [rows, head_dim]. T is the element of a plain cache.
template <class T>
inline void widen_rows(const VectorRows& from, int rows, int head_dim, float* to) {
  if (from.format == KvFormat::kPlain) {
    for (int r = 0; r < rows; ++r) {
      const T* row = reinterpret_cast<const T*>(from.data + r * from.stride);
      for (int d = 0; d < head_dim; d += Vec::kWidth) Vec::load(row + d).store(to + r * head_dim + d);
    }
    return;
  }
  dispatch_kv_format(from.format, [&](auto codec) {
    for (int r = 0; r < rows; ++r) {
      const uint8_t* codes = reinterpret_cast<const uint8_t*>(from.data + r * from.stride);
      decode_vector<decltype(codec)>(codes, from.scale[r * from.scale_stride], head_dim, to + r * head_dim);
    }
  });
}

}  // namespace zigzag::ZIGZAG_CPU_ISA
