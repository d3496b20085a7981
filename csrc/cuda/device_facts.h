// What launch decisions know of a GPU, and what overrides them: plain data, so that decisions are made, tested and
// printed without a GPU.
#pragma once

#include "core/env.h"

namespace zigzag::cuda {

struct DeviceFacts {
  int arch = 0;  // 10 * major + minor, of the code that runs: 90 for sm_90
  int sm_count = 0;
  int shared_per_block = 0;  // bytes of shared memory that a block may ask for
  int shared_per_sm = 0;     // bytes
  int bandwidth = 0;         // of the device memory by its clock and width, in KB/us (GB/s); 0: not known

  // What a block may ask for as dynamic shared memory: 1 KB is left to what a kernel declares itself.
  constexpr int shared_bytes() const { return shared_per_block - 1024; }
};

// Overrides of launch decisions (core/env.h): for tests of the paths that this GPU would not take and for tuning. 0
// means "as decided".
struct LaunchOptions {
  bool force_plain = false, dependent_launch = false;
  int cluster = 0, spread = 0, warps = 0, blocks = 0;
  bool prefill_tiles = false;
  int prefill_splits = 0;

  static LaunchOptions from_environment() {
    return {env_integer(Env::kForcePlain) != 0,
            env_integer(Env::kDependentLaunch) != 0,
            env_integer(Env::kCluster),
            env_integer(Env::kSpread),
            env_integer(Env::kWarps),
            env_integer(Env::kBlocks),
            env_text(Env::kPrefillKernel) == "tiles",
            env_integer(Env::kPrefillSplits)};
  }
};

}  // namespace zigzag::cuda
