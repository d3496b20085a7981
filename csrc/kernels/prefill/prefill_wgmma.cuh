// Launch of the prefill kernel on the warpgroup instructions of sm_90a.
#pragma once

#include "kernels/prefill/prefill_launch.cuh"
#include "kernels/prefill/wgmma_block.cuh"

namespace zigzag::prefill {

// False, and nothing launched, where WgmmaBlock does not serve the head_dim.
template <class T>
bool launch_prefill_wgmma(const AttentionParams& p, void* stream) {
  bool launched = false;
  dispatch_head_dim(p.head_dim, [&](auto head_dim) {
    if constexpr (decltype(head_dim)::value % 64 == 0 && decltype(head_dim)::value <= 256) {
      launch_prefill_block<WgmmaBlock<T, decltype(head_dim)::value>>(p, stream);
      launched = true;
    }
  });
  return launched;
}

}  // namespace zigzag::prefill
