#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels/decode/full/full.h"

namespace zigzag {
namespace decode_full {

// Compiled in full_bf16.cu and full_fp16.cu, so that they build side by side.
template <class Element>
void launch_decode_full(const AttentionParams&, void* stream);
extern template void launch_decode_full<__nv_bfloat16>(const AttentionParams&, void*);
extern template void launch_decode_full<__half>(const AttentionParams&, void*);

}  // namespace decode_full

void decode_full_cuda(const AttentionParams& params, void* stream) {
  if (params.dtype == DType::kBFloat16) return decode_full::launch_decode_full<__nv_bfloat16>(params, stream);
  decode_full::launch_decode_full<__half>(params, stream);
}

}  // namespace zigzag
