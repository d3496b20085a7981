// Argument checks of the torch ops: one line per tensor, with the shape it must have and the message it gets if it does
// not.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <limits>
#include <optional>
#include <string>

#include "core/error.h"
#include "core/params.h"

namespace zigzag::bindings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType to_dtype(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::BFloat16: return DType::kBFloat16;
    default:
      throw Error(concat("dtype ", torch::headeronly::toString(type),
                         " is not supported; supported: float16, bfloat16, and float32 on the CPU"));
  }
}

inline int to_int(const char* name, int64_t value) {
  ZZ_CHECK(value >= 0 && value <= std::numeric_limits<int>::max(), name, " must be in [0, 2^31), got ", value);
  return static_cast<int>(value);
}

inline std::string shape_string(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t size : tensor.sizes()) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}

inline void check_shape(const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape) {
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  std::string expected = "[";
  int64_t dim = 0;
  for (int64_t size : shape) {
    same = same && tensor.size(dim++) == size;
    expected += (expected.size() > 1 ? ", " : "") + std::to_string(size);
  }
  ZZ_CHECK(same, name, " must have shape ", expected, "], got ", shape_string(tensor));
}

inline void check_device(const char* name, const Tensor& tensor, const char* like_name, const Tensor& like) {
  ZZ_CHECK(tensor.is_cuda() == like.is_cuda() && tensor.get_device_index() == like.get_device_index(), name,
           " must be on the device of ", like_name);
}

inline void check_same(const char* name, const Tensor& tensor, const char* like_name, const Tensor& like) {
  ZZ_CHECK(tensor.scalar_type() == like.scalar_type(), name, " must have the dtype of ", like_name);
  check_device(name, tensor, like_name, like);
}

// [batch, heads, tokens, head_dim] on the device of `like`; returns its strides. On CUDA every row must start at a
// multiple of 16 bytes, that is of `granule` elements.
inline Strides check_layout(const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape,
                            const Tensor& like, int64_t granule) {
  check_shape(name, tensor, shape);
  check_device(name, tensor, "q", like);
  ZZ_CHECK(tensor.stride(3) == 1 || tensor.size(3) == 1, name, " must be contiguous in head_dim, its stride there is ",
           tensor.stride(3));
  const Strides strides{tensor.stride(0), tensor.stride(1), tensor.stride(2)};
  bool aligned = reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
  for (int64_t dim = 0; dim < 3; ++dim)
    aligned = aligned && (tensor.size(dim) <= 1 || tensor.stride(dim) % granule == 0);
  ZZ_CHECK(!tensor.is_cuda() || aligned || tensor.numel() == 0, name,
           " must start at a multiple of 16 bytes in every row on CUDA; call .contiguous() on it");
  return strides;
}

// As check_layout, with the dtype of `like`.
inline Strides check_heads(const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape,
                           const Tensor& like) {
  check_same(name, tensor, "q", like);
  return check_layout(name, tensor, shape, like, 8);
}

// Contiguous int32 [count] on the device of `like`.
inline const int32_t* check_numbers(const char* name, const Tensor& tensor, int64_t count, const char* like_name,
                                    const Tensor& like) {
  check_shape(name, tensor, {count});
  ZZ_CHECK(tensor.scalar_type() == ScalarType::Int, name, " must be int32");
  check_device(name, tensor, like_name, like);
  ZZ_CHECK(count <= 1 || tensor.stride(0) == 1, name, " must be contiguous");
  return static_cast<const int32_t*>(tensor.const_data_ptr());
}

inline const int32_t* check_numbers(const char* name, const std::optional<Tensor>& tensor, int64_t count,
                                    const char* like_name, const Tensor& like) {
  return tensor ? check_numbers(name, *tensor, count, like_name, like) : nullptr;
}

// The KV heads that a call serves: as many as its caches have, of the `total` that k_new has.
inline HeadMap check_heads_served(const Tensor& heads, int64_t cache_heads, int64_t total, const Tensor& like) {
  const int32_t* numbers = check_numbers("heads", heads, cache_heads, "q", like);
  ZZ_CHECK(cache_heads >= 1 && cache_heads <= total, "heads names ", cache_heads,
           " KV heads, as many as the caches have; it may name 1 to num_kv_heads = ", total);
  return {numbers, to_int("num_kv_heads", total)};
}

// A logit per query head.
inline const float* check_sink_logits(const std::optional<Tensor>& logits, int64_t num_q_heads, const Tensor& like) {
  if (!logits) return nullptr;
  check_shape("sink_logits", *logits, {num_q_heads});
  ZZ_CHECK(logits->scalar_type() == ScalarType::Float && (num_q_heads <= 1 || logits->stride(0) == 1),
           "sink_logits must be contiguous float32");
  check_device("sink_logits", *logits, "q", like);
  return static_cast<const float*>(logits->const_data_ptr());
}

inline void check_lse(const Tensor& lse, std::initializer_list<int64_t> shape, const Tensor& like) {
  check_shape("lse", lse, shape);
  ZZ_CHECK(lse.scalar_type() == ScalarType::Float && lse.is_contiguous(), "lse must be contiguous float32");
  check_device("lse", lse, "q", like);
}

// cos or sin: [batch or 1, q_len, rotary_dim] on the device of q; the dtype and rotary_dim are checked by check_params.
inline void check_table(const char* name, const Tensor& table, const Tensor& q) {
  ZZ_CHECK(table.dim() == 3 && (table.size(0) == q.size(0) || table.size(0) == 1) && table.size(1) == q.size(2), name,
           " must be [batch or 1, q_len, rotary_dim] = [", q.size(0), " or 1, ", q.size(2), ", rotary_dim], got ",
           shape_string(table));
  check_device(name, table, "q", q);
  ZZ_CHECK(table.size(2) <= 1 || table.stride(2) == 1, name, " must be contiguous in rotary_dim, its stride there is ",
           table.stride(2));
  ZZ_CHECK(table.scalar_type() == ScalarType::Float || table.scalar_type() == q.scalar_type(), name,
           " must be float32 or have the dtype of q, got ", torch::headeronly::toString(table.scalar_type()));
  const int64_t bytes = static_cast<int64_t>(element_size(to_dtype(table.scalar_type())));
  bool aligned = reinterpret_cast<uintptr_t>(table.const_data_ptr()) % 16 == 0;
  for (int64_t dim = 0; dim < 2; ++dim) aligned &= table.size(dim) <= 1 || table.stride(dim) * bytes % 16 == 0;
  ZZ_CHECK(!table.is_cuda() || aligned || table.numel() == 0, name,
           " must start at a multiple of 16 bytes in every row on CUDA; call .contiguous() on it");
}

inline Rotary check_rotary(const std::optional<Tensor>& cos, const std::optional<Tensor>& sin, const Tensor& q) {
  ZZ_CHECK(cos.has_value() == sin.has_value(), "cos and sin must be given both or neither");
  if (!cos) return {};
  check_table("cos", *cos, q);
  check_table("sin", *sin, q);
  ZZ_CHECK(cos->size(2) == sin->size(2) && cos->scalar_type() == sin->scalar_type(),
           "cos and sin must have the same rotary_dim and dtype, got ", shape_string(*cos), " and ",
           shape_string(*sin));
  const auto batch_stride = [](const Tensor& table) { return table.size(0) == 1 ? 0 : table.stride(0); };
  ZZ_CHECK(cos->size(2) > 0, "rotary_dim (last size of cos and sin) must be positive");
  if (cos->numel() == 0 || sin->numel() == 0) return {};  // no token to rotate, and no memory to point at
  return {cos->const_data_ptr(),
          sin->const_data_ptr(),
          batch_stride(*cos),
          cos->stride(1),
          batch_stride(*sin),
          sin->stride(1),
          to_int("rotary_dim", cos->size(2)),
          to_dtype(cos->scalar_type())};
}

}  // namespace zigzag::bindings
