// Which layers and KV heads retrieve and which stream, with the sink and window of the streaming ones. Valid by
// construction.
#pragma once

#include <vector>

#include "core/layer_kind.h"

namespace zigzag {

class LayerPlan {
 public:
  // sink and window are in tokens. 64-bit, so that a value that does not fit a position (int32) is rejected here and
  // never wraps around on its way in. Throws zigzag::Error on no layers, layers that name different numbers of KV
  // heads, sink < 0, window < 1 or sink + window >= 2^31.
  LayerPlan(std::vector<HeadKinds> layers, int64_t sink, int64_t window);

  const std::vector<HeadKinds>& layers() const { return layers_; }
  int num_layers() const { return static_cast<int>(layers_.size()); }
  // KV heads per layer of the models that the plan fits; 0 where no layer is mixed, and any number does.
  int num_kv_heads() const { return num_kv_heads_; }
  int sink() const { return sink_; }
  int window() const { return window_; }

 private:
  std::vector<HeadKinds> layers_;
  int num_kv_heads_ = 0;
  int sink_;
  int window_;
};

}  // namespace zigzag
