// decode_full over quantised caches: the same jobs, tiles of codes.
#pragma once

#include "kernels/decode/codes/segments.cuh"
#include "kernels/decode/full/full.cuh"

namespace zigzag::decode_full {

template <class S>
__global__ void __launch_bounds__(kMaxWarps * 32, 1) decode_full_codes_kernel(const __grid_constant__ Params p) {
  if (in_cluster<S>(p)) cuda::cluster_arrive_relaxed();
  Segment segment;
  Job<S> job = {p, {}, 0, 0};
  if (job.start(segment)) run_code_segments<S>(p, segment, job);
}

// Instantiated by one file per pair of formats.
template <class KFormat, class VFormat>
void launch_decode_full_codes(const AttentionParams& a, void* stream) {
  ZZ_CHECK(a.workspace_bytes >= workspace_bytes(a.head_dim), "workspace of ", a.workspace_bytes,
           " bytes is too small; needed: ", workspace_bytes(a.head_dim));
  check_strides(a);
  dispatch_code_shape<KFormat, VFormat, false>(a, [&](auto shape) {
    using S = decltype(shape);
    launch_planned<S>(a, decode_full_codes_kernel<S>, decode_full_codes_kernel<S>, stream);
  });
}

}  // namespace zigzag::decode_full
