#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels/decode/stream/stream.h"

namespace zigzag {
namespace decode_stream {

// Compiled in stream_bf16.cu and stream_fp16.cu, so that they build side by side.
template <class Element>
void launch_decode_stream(const AttentionParams&, void* stream);
extern template void launch_decode_stream<__nv_bfloat16>(const AttentionParams&, void*);
extern template void launch_decode_stream<__half>(const AttentionParams&, void*);

}  // namespace decode_stream

void decode_stream_cuda(const AttentionParams& params, void* stream) {
  if (params.dtype == DType::kBFloat16) return decode_stream::launch_decode_stream<__nv_bfloat16>(params, stream);
  decode_stream::launch_decode_stream<__half>(params, stream);
}

}  // namespace zigzag
