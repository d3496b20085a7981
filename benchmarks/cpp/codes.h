// Quantised vectors on the host, for filling caches and for the reference.
#pragma once

#include <cstdint>
#include <vector>

#include "core/types.h"

namespace zigzag::bench {

// Vectors of `head_dim` elements each, packed.
struct Codes {
  std::vector<char> bytes;
  std::vector<float> scales;
};

Codes encode_vectors(const std::vector<float>& x, KvFormat format, int head_dim);
std::vector<float> decode_vectors(const Codes& codes, KvFormat format, int head_dim);

}  // namespace zigzag::bench
