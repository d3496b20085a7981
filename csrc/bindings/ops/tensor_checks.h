// Argument checks of the torch ops: one line per tensor, with the shape it must have and the message it gets if it does
// not.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <limits>
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

// int32 [batch] on the device of `like`.
inline const int32_t* check_lengths(const char* name, const Tensor& tensor, int64_t batch, const Tensor& like) {
  check_shape(name, tensor, {batch});
  ZZ_CHECK(tensor.scalar_type() == ScalarType::Int, name, " must be int32");
  ZZ_CHECK(tensor.is_cuda() == like.is_cuda() && tensor.get_device_index() == like.get_device_index(), name,
           " must be on the device of the keys");
  ZZ_CHECK(batch <= 1 || tensor.stride(0) == 1, name, " must be contiguous");
  return static_cast<const int32_t*>(tensor.const_data_ptr());
}

inline int to_int(const char* name, int64_t value) {
  ZZ_CHECK(value >= 0 && value <= std::numeric_limits<int>::max(), name, " must be in [0, 2^31), got ", value);
  return static_cast<int>(value);
}

}  // namespace zigzag::bindings
