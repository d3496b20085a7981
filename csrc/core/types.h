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

// How a cache holds its vectors: as elements of the model's dtype, or as codes with one float32 scale per vector. The
// byte layout of each format is in kv/format_*.h.
enum class KvFormat : int8_t { kPlain = 0, kFp8 = 1, kInt8 = 2, kInt4 = 3 };

constexpr const char* name(KvFormat format) {
  switch (format) {
    case KvFormat::kPlain: return "none";
    case KvFormat::kFp8: return "fp8";
    case KvFormat::kInt8: return "int8";
    case KvFormat::kInt4: return "int4";
  }
  return "unknown";
}

// Bytes of the elements or codes of one vector, without its scale.
constexpr int64_t vector_bytes(KvFormat format, DType dtype, int head_dim) {
  switch (format) {
    case KvFormat::kFp8:
    case KvFormat::kInt8: return head_dim;
    case KvFormat::kInt4: return head_dim / 2;
    case KvFormat::kPlain: break;
  }
  return head_dim * static_cast<int64_t>(element_size(dtype));
}

// Bytes of the scale that belongs to a vector.
constexpr int64_t scale_bytes(KvFormat format) { return format == KvFormat::kPlain ? 0 : 4; }

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
