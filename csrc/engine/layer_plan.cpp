#include "engine/layer_plan.h"

#include <limits>
#include <utility>

namespace zigzag {

LayerPlan::LayerPlan(std::vector<LayerKind> kinds, int64_t sink, int64_t window)
    : kinds_(std::move(kinds)), sink_(static_cast<int>(sink)), window_(static_cast<int>(window)) {
  constexpr int64_t kMaxTokens = std::numeric_limits<int32_t>::max();
  ZZ_CHECK(!kinds_.empty(), "a plan needs at least one layer, got none");
  ZZ_CHECK(sink >= 0, "sink must be >= 0 tokens, got ", sink);
  ZZ_CHECK(window >= 1, "window must be >= 1 token (a query attends itself), got ", window);
  ZZ_CHECK(sink <= kMaxTokens && window <= kMaxTokens - sink, "sink + window must be at most ", kMaxTokens,
           " tokens, got sink ", sink, " and window ", window);
}

}  // namespace zigzag
