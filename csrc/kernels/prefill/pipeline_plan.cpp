#include "kernels/prefill/pipeline_plan.h"

#include <algorithm>

namespace zigzag::prefill {
namespace {

// Steps that a block should have to share the keys of a tile: with fewer, its own start and its part of the merge (a
// launch of its own) cost as much as the steps that it takes over.
constexpr int kLeastSteps = 2;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool has_pipeline(const PrefillRequest& r, const cuda::DeviceFacts& device) {
  const bool same = r.formats.k == r.formats.v;
  const bool formats = same || (r.formats.k == KvFormat::kInt8 && r.formats.v == KvFormat::kInt4);
  return device.arch == 90 && r.window == 0 && (r.head_dim == 64 || r.head_dim == 128) && formats;
}

// As many as fill the GPU once: all blocks then run at the same time, and the parts of the tiles fit in the workspace.
int splits_of(const PrefillRequest& r, const cuda::DeviceFacts& device, int wanted, int64_t tiles,
              int64_t scratch_bytes) {
  const int64_t steps = ceil_div(int64_t{r.slots} + (r.formats.k == KvFormat::kPlain ? r.q_len : 0), kPipelineKeys);
  const int64_t room = scratch_bytes / pipeline_part_bytes(r.head_dim) / tiles;
  const int64_t decided = wanted > 0 ? wanted : std::min<int64_t>(device.sm_count / tiles, steps / kLeastSteps);
  return static_cast<int>(std::max<int64_t>(1, std::min(decided, room)));
}

}  // namespace

PrefillPlan plan_prefill(const PrefillRequest& r, const cuda::DeviceFacts& device, const cuda::LaunchOptions& options,
                         int64_t scratch_bytes) {
  PrefillPlan plan;
  if (options.force_plain || options.prefill_tiles || !has_pipeline(r, device)) return plan;
  plan.kernel = PrefillKernel::kPipeline;
  plan.tiles = ceil_div(int64_t{r.q_len} * r.group, kPipelineRows) * r.batch * r.num_kv_heads;
  plan.splits = splits_of(r, device, options.prefill_splits, plan.tiles, scratch_bytes);
  return plan;
}

}  // namespace zigzag::prefill
