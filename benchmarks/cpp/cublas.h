// cuBLAS, found when the program runs: the benchmarks build and run without it, and only projections ask for it.
#pragma once

#include <memory>

#include "device.h"

namespace zigzag::bench {

class Cublas {
 public:
  // Enqueues on `stream` (a cudaStream_t). Throws where no libcublas can be loaded.
  Cublas(Device& device, void* stream);

  // May be captured in a graph: the workspace is this object's own. The constructor may not.
  void linear(const Device::Linear& linear);

 private:
  void* library_;
  std::shared_ptr<void> workspace_, handle_;
};

}  // namespace zigzag::bench
