#include "codes.h"

#include <algorithm>

#include "kv/formats.h"

namespace zigzag::bench {

Codes encode_vectors(const std::vector<float>& x, KvFormat format, int head_dim) {
  const std::size_t dim = static_cast<std::size_t>(head_dim), count = x.size() / dim;
  Codes codes;
  codes.scales.resize(count);
  dispatch_kv_format(format, [&](auto codec) {
    using Format = decltype(codec);
    codes.bytes.assign(x.size() * Format::kBits / 8, 0);
    for (std::size_t i = 0; i < count; ++i) {
      uint32_t amax = 0;
      for (std::size_t d = 0; d < dim; ++d) amax = std::max(amax, zigzag::float_bits(x[i * dim + d]) & 0x7fffffffu);
      const VectorScale scale(amax, Format::kMaxCode);
      codes.scales[i] = scale.scale;
      for (std::size_t d = i * dim; d < (i + 1) * dim; ++d) {
        const uint32_t code = Format::encode(scale.scaled(x[d])) << d * Format::kBits % 8;
        char& byte = codes.bytes[d * Format::kBits / 8];
        byte = static_cast<char>(static_cast<uint32_t>(byte) | code);
      }
    }
  });
  return codes;
}

std::vector<float> decode_vectors(const Codes& codes, KvFormat format, int head_dim) {
  std::vector<float> x(codes.scales.size() * static_cast<std::size_t>(head_dim));
  dispatch_kv_format(format, [&](auto codec) {
    using Format = decltype(codec);
    for (std::size_t d = 0; d < x.size(); ++d) {
      const uint32_t byte = static_cast<uint8_t>(codes.bytes[d * Format::kBits / 8]);
      const uint32_t code = byte >> d * Format::kBits % 8 & ((1u << Format::kBits) - 1);
      x[d] = Format::decode(code) * codes.scales[d / static_cast<std::size_t>(head_dim)];
    }
  });
  return x;
}

}  // namespace zigzag::bench
