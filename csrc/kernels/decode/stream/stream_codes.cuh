// decode_stream over quantised caches: the same jobs, tiles of codes.
#pragma once

#include "kernels/decode/codes/segments.cuh"
#include "kernels/decode/stream/stream.cuh"

namespace zigzag::decode_stream {

template <class S>
__global__ void __launch_bounds__(kMaxWarps * 32, 1) decode_stream_codes_kernel(const __grid_constant__ Params p) {
  if (in_cluster<S>(p)) cuda::cluster_arrive_relaxed();
  Job<S> job = {p, in_cluster<S>(p) ? cuda::cluster_rank() : 0};
  run_code_segments<S>(p, job.start(), job);
}

// Instantiated by one file per pair of formats.
template <class KFormat, class VFormat>
void launch_decode_stream_codes(const AttentionParams& a, void* stream) {
  check_strides(a);
  dispatch_code_shape<KFormat, VFormat, true>(a, [&](auto shape) {
    using S = decltype(shape);
    launch_planned<S>(a, decode_stream_codes_kernel<S>, decode_stream_codes_kernel<S>, stream);
  });
}

}  // namespace zigzag::decode_stream
