#include "engine/layer_plan.h"

#include <limits>
#include <utility>

namespace zigzag {

LayerPlan::LayerPlan(std::vector<HeadKinds> layers, int64_t sink, int64_t window)
    : layers_(std::move(layers)), sink_(static_cast<int>(sink)), window_(static_cast<int>(window)) {
  constexpr int64_t kMaxTokens = std::numeric_limits<int32_t>::max();
  ZZ_CHECK(!layers_.empty(), "a plan needs at least one layer, got none");
  ZZ_CHECK(sink >= 0, "sink must be >= 0 tokens, got ", sink);
  ZZ_CHECK(window >= 1, "window must be >= 1 token (a query attends itself), got ", window);
  ZZ_CHECK(sink <= kMaxTokens && window <= kMaxTokens - sink, "sink + window must be at most ", kMaxTokens,
           " tokens, got sink ", sink, " and window ", window);
  for (std::size_t layer = 0; layer < layers_.size(); ++layer) {
    if (!layers_[layer].mixed()) continue;
    const int heads = static_cast<int>(layers_[layer].kinds.size());
    if (num_kv_heads_ == 0) num_kv_heads_ = heads;
    ZZ_CHECK(heads == num_kv_heads_, "layers must have one number of KV heads; layer ", layer, " names ", heads,
             ", an earlier one ", num_kv_heads_);
  }
}

}  // namespace zigzag
