// Element types and strides: the vocabulary every layer of the core shares.
#pragma once

#include <cstddef>
#include <cstdint>
#include <iterator>
#include <string>

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

// The dtype of that name; throws on any other name.
DType parse_dtype(const std::string& given);

constexpr std::size_t element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// How a cache holds its vectors: as elements of the model's dtype, or as codes with one float32 scale per vector. The
// byte layout of each format is in kv/format_*.h.
enum class KvFormat : int8_t { kPlain = 0, kFp8 = 1, kInt8 = 2, kInt4 = 3 };

struct KvFormatInfo {
  const char* name;
  int bits;                // of a code; 0 where elements are of the model's dtype
  const char* code_dtype;  // as torch calls it, one byte wide: int4 puts two codes into one. "" as for bits
  int scale_bytes;         // of the scale that belongs to a vector
};

// The table of formats: names, sizes, messages and the Python package read it. (A function: an array would be data that
// the CPU kernels of two instruction sets share.)
constexpr KvFormatInfo info(KvFormat format) {
  switch (format) {
    case KvFormat::kPlain: break;
    case KvFormat::kFp8: return {"fp8", 8, "float8_e4m3fn", 4};
    case KvFormat::kInt8: return {"int8", 8, "int8", 4};
    case KvFormat::kInt4: return {"int4", 4, "uint8", 4};
  }
  return {"none", 0, "", 0};
}
inline constexpr KvFormat kKvFormats[] = {KvFormat::kPlain, KvFormat::kFp8, KvFormat::kInt8, KvFormat::kInt4};

constexpr const char* name(KvFormat format) { return info(format).name; }

// The format of that name; throws on any other name.
KvFormat parse_kv_format(const std::string& given);

// Bytes of the elements or codes of one vector, without its scale.
constexpr int64_t vector_bytes(KvFormat format, int64_t element_bytes, int64_t head_dim) {
  const int bits = info(format).bits;
  return bits == 0 ? head_dim * element_bytes : head_dim * bits / 8;
}
constexpr int64_t vector_bytes(KvFormat format, DType dtype, int head_dim) {
  return vector_bytes(format, static_cast<int64_t>(element_size(dtype)), head_dim);
}

// Bytes of the scale that belongs to a vector.
constexpr int64_t scale_bytes(KvFormat format) { return info(format).scale_bytes; }

// How a cache holds its keys and its values.
struct KvFormats {
  KvFormat k = KvFormat::kPlain;
  KvFormat v = KvFormat::kPlain;
};

// Strides of a [batch, heads, tokens, head_dim] tensor, in elements. head_dim is always contiguous.
// 64-bit: 4M tokens x 8 heads x 128 overflows 32 bits.
struct Strides {
  int64_t batch;
  int64_t head;
  int64_t token;
};

// Shapes that have a compiled kernel. One list: dispatch tables, checks and error messages all read it.
inline constexpr int kHeadDims[] = {64, 80, 96, 128, 192, 256, 512};
inline constexpr int kMaxHeadDim = *(std::end(kHeadDims) - 1);
inline constexpr int kMaxGroupSize = 16;      // num_q_heads / num_kv_heads
inline constexpr int kMaxDecodeQueries = 16;  // q_len up to here takes a decode kernel, above it the prefill kernel

}  // namespace zigzag
