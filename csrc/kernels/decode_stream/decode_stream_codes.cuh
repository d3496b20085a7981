// decode_stream over quantised caches: the same jobs, tiles of codes.
#pragma once

#include "kernels/attend_codes.cuh"
#include "kernels/decode_stream/decode_stream.cuh"

namespace zigzag::decode_stream {

template <class S>
__global__ void __launch_bounds__(kMaxWarps * 32, 1) decode_stream_codes_kernel(const __grid_constant__ Params p) {
  if (in_cluster<S>(p)) device::cluster_arrive_relaxed();
  Job<S> job = {p, in_cluster<S>(p) ? device::cluster_rank() : 0};
  run_code_segments<S>(p, job.start(), job);
}

template <class S>
void launch_codes(const AttentionParams& a, void* stream) {
  Params p = {a, {}, a.num_q_heads / a.num_kv_heads, 0, 0};
  device::LaunchConfig config = configure<S>(p);
  config.dependent_launch &= a.columns_before + a.columns_after == 0;
  device::launch(decode_stream_codes_kernel<S>, config, p, stream);
}

// Instantiated by one file per pair of formats.
template <class KFormat, class VFormat>
void launch_decode_stream_codes(const AttentionParams& a, void* stream) {
  check_strides(a);
  dispatch_code_shape<KFormat, VFormat, true>(a, [&](auto shape) { launch_codes<decltype(shape)>(a, stream); });
}

}  // namespace zigzag::decode_stream
