#include "engine/layer_plan.h"

#include <algorithm>
#include <limits>
#include <string>
#include <utility>

namespace zigzag {
namespace {

// `whose`: "" or "layer 3: ".
void check_size(const RingSize& size, const std::string& whose) {
  constexpr int64_t kMaxTokens = std::numeric_limits<int32_t>::max();
  ZZ_CHECK(size.sink >= 0, whose, "sink must be >= 0 tokens, got ", size.sink);
  ZZ_CHECK(size.window >= 1, whose, "window must be >= 1 token (a query attends itself), got ", size.window);
  ZZ_CHECK(size.sink <= kMaxTokens && size.window <= kMaxTokens - size.sink, whose, "sink + window must be at most ",
           kMaxTokens, " tokens, got sink ", size.sink, " and window ", size.window);
}

void check_layer_size(const HeadKinds& layer, const std::optional<RingSize>& size, std::size_t index) {
  const bool native = layer.kinds[0] == LayerKind::kNative;
  ZZ_CHECK(size.has_value() || !native, "layer ", index, " is native and needs a size of its own: sink 0, its window");
  if (!size) return;
  ZZ_CHECK(layer.mixed() || layer.kinds[0] != LayerKind::kState, "layer ", index,
           " keeps no keys and has no sink and window");
  ZZ_CHECK(layer.mixed() || is_ring(layer.kinds[0]), "layer ", index,
           " retrieves: it keeps every token and has no sink and window");
  check_size(*size, concat("layer ", index, ": "));
  ZZ_CHECK(!native || size->sink == 0, "layer ", index, " is native: its sink must be 0, got ", size->sink);
}

}  // namespace

LayerPlan::LayerPlan(std::vector<HeadKinds> layers, int64_t sink, int64_t window,
                     std::vector<std::optional<RingSize>> sizes)
    : layers_(std::move(layers)), sizes_(std::move(sizes)), size_{sink, window} {
  ZZ_CHECK(!layers_.empty(), "a plan needs at least one layer, got none");
  check_size(size_, "");
  ZZ_CHECK(sizes_.empty() || sizes_.size() == layers_.size(), "layer_sizes has ", sizes_.size(),
           " entries, the plan has ", layers_.size(), " layers");
  for (std::size_t layer = 0; layer < layers_.size(); ++layer) {
    const std::vector<LayerKind>& kinds = layers_[layer].kinds;
    check_layer_size(layers_[layer], sizes_.empty() ? std::nullopt : sizes_[layer], layer);
    if (!layers_[layer].mixed()) continue;
    for (const LayerKind whole : {LayerKind::kNative, LayerKind::kState}) {
      ZZ_CHECK(std::find(kinds.begin(), kinds.end(), whole) == kinds.end(), "layer ", layer, " mixes ", name(whole),
               " heads with others; a ", name(whole), " layer is one as a whole");
    }
    const int heads = static_cast<int>(kinds.size());
    if (num_kv_heads_ == 0) num_kv_heads_ = heads;
    ZZ_CHECK(heads == num_kv_heads_, "layers must have one number of KV heads; layer ", layer, " names ", heads,
             ", an earlier one ", num_kv_heads_);
  }
}

}  // namespace zigzag
