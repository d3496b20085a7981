// Which layers and KV heads retrieve, which stream and which have a window of the model's own, with the sink and window
// of each, and which layers keep no keys. Valid by construction.
#pragma once

#include <optional>
#include <vector>

#include "core/layer_kind.h"

namespace zigzag {

// Tokens that a ring keeps. 64-bit, so that a value that does not fit a position (int32) is rejected in LayerPlan and
// never wraps around on its way in.
struct RingSize {
  int64_t sink;
  int64_t window;
};

class LayerPlan {
 public:
  // sink and window are of the streaming layers that have none of their own in `sizes`, which is empty or has an entry
  // per layer; a native layer needs one. Throws zigzag::Error on no layers, layers that name different numbers of KV
  // heads, mixed layers with native heads or ones without keys, sizes of layers that have no ring, sinks of native
  // ones, sink < 0, window < 1 or sink + window >= 2^31.
  LayerPlan(std::vector<HeadKinds> layers, int64_t sink, int64_t window,
            std::vector<std::optional<RingSize>> sizes = {});

  const std::vector<HeadKinds>& layers() const { return layers_; }
  int num_layers() const { return static_cast<int>(layers_.size()); }
  // KV heads per layer of the models that the plan fits; 0 where no layer is mixed, and any number does.
  int num_kv_heads() const { return num_kv_heads_; }
  int sink() const { return static_cast<int>(size_.sink); }
  int window() const { return static_cast<int>(size_.window); }
  // Of the ring of a layer that has one.
  RingSize size(int layer) const {
    const auto index = static_cast<std::size_t>(layer);
    return index < sizes_.size() && sizes_[index] ? *sizes_[index] : size_;
  }

 private:
  std::vector<HeadKinds> layers_;
  std::vector<std::optional<RingSize>> sizes_;
  RingSize size_;
  int num_kv_heads_ = 0;
};

}  // namespace zigzag
