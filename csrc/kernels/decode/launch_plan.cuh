// Launches what plan.h has decided.
#pragma once

#include "cuda/launch.h"
#include "kernels/decode/plan.h"
#include "kernels/decode/state.cuh"

namespace zigzag::attend {

// Launches `one_token` or `any`, as the plan has it. (Where there is no kernel for one token they are the same.)
// `bare`, if there is one, takes the place of `one_token` where it serves: in clusters, for calls that are bare.
template <class S>
void launch_planned(const AttentionParams& a, void (*any)(Params), void (*one_token)(Params), void* stream,
                    void (*bare)(Params) = nullptr) {
  DecodeRequest request = decode_request(a);
  request.block = S::kBlock;
  cuda::DeviceFacts device = cuda::device_facts();
  device.arch = cuda::code_arch(reinterpret_cast<const void*>(any));
  const cuda::LaunchOptions& options = cuda::launch_options();

  const bool takes_bare = bare != nullptr && is_bare(a);
  const auto kernel_of = [&](const DecodePlan& plan) {
    if (!plan.one_token) return any;
    return takes_bare && plan.cluster > 1 ? bare : one_token;
  };
  const auto config_of = [](const DecodePlan& plan) {
    cuda::LaunchConfig config = {};
    config.grid = dim3(static_cast<unsigned>(plan.grid[0]), static_cast<unsigned>(plan.grid[1]),
                       static_cast<unsigned>(plan.grid[2]));
    config.block = dim3(static_cast<unsigned>(32 * plan.warps));
    config.shared_bytes = plan.layout.total;
    config.cluster = plan.cluster;
    return config;
  };
  const auto places = [&](const DecodePlan& plan) {
    return cuda::max_active_clusters(kernel_of(plan), config_of(plan));
  };
  const DecodePlan plan =
      S::kRing ? plan_ring(request, device, options, places) : plan_full(request, device, options, places);

  const bool length_first = !S::kRing && request.by_rows;
  const Params p = {{a, plan.by_position, length_first}, plan.layout, request.group, plan.row_blocks, plan.team,
                    cuda::floor_log2(plan.cluster),      plan.spread};
  cuda::LaunchConfig config = config_of(plan);
  // A launch that reads what the one before it appended must not start early.
  const bool whole = a.columns_before + a.columns_after == 0;
  config.dependent_launch = device.arch >= 90 && !options.force_plain && options.dependent_launch && whole;
  cuda::launch(kernel_of(plan), config, p, stream);
}

}  // namespace zigzag::attend
