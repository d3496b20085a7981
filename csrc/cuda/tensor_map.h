// Descriptions of tensors of 16-bit elements for copies of their boxes (cuda/bulk_copy.cuh).
#pragma once

#include <cudaTypedefs.h>

#include "core/types.h"
#include "cuda/driver.h"

namespace zigzag::cuda {

// A tensor [rows, heads, tokens, head_dim], strides in elements.
struct TensorShape {
  const void* data;
  int rows, heads, tokens, head_dim;
  Strides stride;
};

// Whether copies of boxes serve the tensor: they want memory, and strides of whole 16 bytes below 2^40 bytes. (A
// stride of 0, as of expanded tensors, is none that is documented to work.)
inline bool has_boxes(const TensorShape& t) {
  const auto serves = [](int size, int64_t stride) {
    return size == 1 || (stride > 0 && stride * 2 % 16 == 0 && stride * 2 < (int64_t{1} << 40));
  };
  return t.data != nullptr && reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && t.rows > 0 && t.heads > 0 &&
         t.tokens > 0 && serves(t.tokens, t.stride.token) && serves(t.heads, t.stride.head) &&
         serves(t.rows, t.stride.batch);
}

// Boxes of `box_tokens` tokens of one head by 64 elements, whose rows of 128 bytes arrive with their 16-byte pieces
// permuted as warpgroup products take them (swizzled_operand): piece c of row r lies at c XOR r mod 8.
inline CUtensorMap box_map(const TensorShape& t, int box_tokens) {
  static const auto encode = driver_function<PFN_cuTensorMapEncodeTiled_v12000>("cuTensorMapEncodeTiled", 12000);
  const auto bytes = [&](int size, int64_t stride) {
    return static_cast<cuuint64_t>(2 *
                                   (size == 1 ? t.head_dim : stride));  // of one there is no next: any that is valid
  };
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(t.head_dim), static_cast<cuuint64_t>(t.tokens),
                              static_cast<cuuint64_t>(t.heads), static_cast<cuuint64_t>(t.rows)};
  const cuuint64_t strides[] = {bytes(t.tokens, t.stride.token), bytes(t.heads, t.stride.head),
                                bytes(t.rows, t.stride.batch)};
  const cuuint32_t box[] = {64, static_cast<cuuint32_t>(box_tokens), 1, 1}, steps[] = {1, 1, 1, 1};
  CUtensorMap map;
  // Bits are copied as they are, so float16 may stand for bfloat16.
  const CUresult status = encode(&map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4, const_cast<void*>(t.data), sizes, strides,
                                 box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  ZZ_CHECK(status == CUDA_SUCCESS, "cuTensorMapEncodeTiled failed with CUDA driver error ", static_cast<int>(status),
           " for a tensor of ", t.rows, " rows, ", t.heads, " heads, ", t.tokens, " tokens, head_dim ", t.head_dim);
  return map;
}

}  // namespace zigzag::cuda
