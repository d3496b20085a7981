// Checks of a key or value cache with its scales. The dtype of the cache tells its format:
//
//   dtype of q       elements            [rows, num_kv_heads, slots, head_dim]
//   float8_e4m3fn    fp8 codes           [rows, num_kv_heads, slots, head_dim]       scale float32 [rows,
//   int8             int8 codes          [rows, num_kv_heads, slots, head_dim]       num_kv_heads, slots]
//   uint8            int4 codes          [rows, num_kv_heads, slots, head_dim / 2]
//
// rows is batch, or any number where cache_rows says which of them a batch row has.
#pragma once

#include <cstdint>
#include <optional>

#include "bindings/ops/tensor_checks.h"

namespace zigzag::bindings {

inline KvFormat cache_format(const char* name, const Tensor& cache, const Tensor& like) {
  if (cache.scalar_type() == like.scalar_type()) return KvFormat::kPlain;
  switch (cache.scalar_type()) {
    case ScalarType::Float8_e4m3fn: return KvFormat::kFp8;
    case ScalarType::Char: return KvFormat::kInt8;
    case ScalarType::Byte: return KvFormat::kInt4;
    default:
      throw Error(concat(name,
                         " must have the dtype of q, or a quantised one: float8_e4m3fn, int8, or uint8 for int4; got ",
                         torch::headeronly::toString(cache.scalar_type())));
  }
}

// The sizes that both caches of a call have.
struct CacheShape {
  int64_t rows, heads, slots;
};

// Fills in the store, the strides and nothing else: pointers are taken once every check has passed.
inline void check_cache(const char* name, const Tensor& cache, const char* scale_name,
                        const std::optional<Tensor>& scale, const CacheShape& shape, const Tensor& like, KvStore& store,
                        Strides& stride) {
  const int64_t head_dim = like.size(3);
  const KvFormat format = cache_format(name, cache, like);
  const int64_t row = format == KvFormat::kInt4 ? head_dim / 2 : head_dim;
  const bool plain = format == KvFormat::kPlain;
  stride = check_layout(name, cache, {shape.rows, shape.heads, shape.slots, row}, like, plain ? 8 : 16);
  store.format = format;
  ZZ_CHECK(scale.has_value() == !plain, scale_name,
           plain ? " belongs to a quantised cache, but " : " is missing: ", name, " holds ",
           plain ? "elements of the dtype of q" : "codes of format ", plain ? "" : zigzag::name(format));
  if (plain) return;
  check_shape(scale_name, *scale, {shape.rows, shape.heads, shape.slots});
  ZZ_CHECK(scale->scalar_type() == ScalarType::Float, scale_name, " must be float32");
  check_device(scale_name, *scale, "q", like);
  store.scale_stride = {scale->stride(0), scale->stride(1), scale->stride(2)};
}

inline float* scale_pointer(const std::optional<Tensor>& scale) {
  return scale ? static_cast<float*>(scale->mutable_data_ptr()) : nullptr;
}

}  // namespace zigzag::bindings
