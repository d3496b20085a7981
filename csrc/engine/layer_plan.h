// Which layers retrieve and which stream, with the sink and window of the streaming ones. Valid by construction.
#pragma once

#include <vector>

#include "core/layer_kind.h"

namespace zigzag {

class LayerPlan {
 public:
  // sink and window are in tokens. 64-bit, so that a value that does not fit a position (int32) is rejected here and
  // never wraps around on its way in. Throws zigzag::Error on no layers, sink < 0, window < 1 or sink + window >= 2^31.
  LayerPlan(std::vector<LayerKind> kinds, int64_t sink, int64_t window);

  const std::vector<LayerKind>& kinds() const { return kinds_; }
  int num_layers() const { return static_cast<int>(kinds_.size()); }
  int sink() const { return sink_; }
  int window() const { return window_; }

 private:
  std::vector<LayerKind> kinds_;
  int sink_;
  int window_;
};

}  // namespace zigzag
