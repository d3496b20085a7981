// decode_full over quantised caches: the same jobs, tiles of codes.
#pragma once

#include "kernels/attend_codes.cuh"
#include "kernels/decode_full/decode_full.cuh"

namespace zigzag::decode_full {

template <class S>
__global__ void __launch_bounds__(kMaxWarps * 32, 1) decode_full_codes_kernel(const __grid_constant__ Params p) {
  if (in_cluster<S>(p)) device::cluster_arrive_relaxed();
  Segment segment;
  Job<S> job = {p, {}, 0, 0};
  if (job.start(segment)) run_code_segments<S>(p, segment, job);
}

template <class S>
void launch_codes(const AttentionParams& a, void* stream) {
  const device::DeviceInfo& device = device::device_info();
  const device::LaunchOptions& options = device::launch_options();
  const int group = a.num_q_heads / a.num_kv_heads, rows = group * a.q_len;
  Params p = {a, {}, group, (rows + S::kRows - 1) / S::kRows, 0};
  const int groups = a.batch * p.num_kv_heads * p.row_blocks;
  const bool modern = device.arch >= 90 && !options.force_plain;
  device::LaunchConfig config = {};
  // A launch that reads what the one before it appended must not start early.
  config.dependent_launch = modern && options.dependent_launch && a.columns_before + a.columns_after == 0;
  const int cluster = options.cluster > 0 ? 1 << device::floor_log2(std::min(options.cluster, kMaxCluster)) : 8;
  if (modern && cluster > 1 && groups * cluster * 9 / 4 >= device.sm_count && groups * cluster <= device.sm_count) {
    configure<S>(p, config, cluster);
    if (groups <= device::max_active_clusters(decode_full_codes_kernel<S>, config)) {
      return device::launch(decode_full_codes_kernel<S>, config, p, stream);
    }
  }
  configure<S>(p, config, 1);
  device::launch(decode_full_codes_kernel<S>, config, p, stream);
}

// Instantiated by one file per pair of formats.
template <class KFormat, class VFormat>
void launch_decode_full_codes(const AttentionParams& a, void* stream) {
  ZZ_CHECK(a.workspace_bytes >= workspace_bytes(a.head_dim), "workspace of ", a.workspace_bytes,
           " bytes is too small; needed: ", workspace_bytes(a.head_dim));
  check_strides(a);
  dispatch_code_shape<KFormat, VFormat, false>(a, [&](auto shape) { launch_codes<decltype(shape)>(a, stream); });
}

}  // namespace zigzag::decode_full
