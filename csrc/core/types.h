// Element types and strides: the vocabulary every layer of the core shares.
#pragma once

#include <cstddef>
#include <cstdint>

namespace zigzag {

enum class DType : int8_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

constexpr const char* name(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return "float32";
    case DType::kFloat16: return "float16";
    case DType::kBFloat16: return "bfloat16";
  }
  return "unknown";
}

constexpr std::size_t element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Strides of a [batch, heads, tokens, head_dim] tensor, in elements. head_dim is always contiguous.
// 64-bit: 4M tokens x 8 heads x 128 overflows 32 bits.
struct Strides {
  int64_t batch;
  int64_t head;
  int64_t token;
};

// Shapes that have a compiled kernel. One list: dispatch tables, checks and error messages all read it.
inline constexpr int kHeadDims[] = {64, 80, 96, 128, 256};
inline constexpr int kMaxGroupSize = 16;      // num_q_heads / num_kv_heads
inline constexpr int kMaxDecodeQueries = 16;  // q_len up to here takes a decode kernel, above it the prefill kernel

}  // namespace zigzag
