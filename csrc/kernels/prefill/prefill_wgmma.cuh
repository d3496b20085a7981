// Launch of the prefill kernel on the warpgroup instructions of sm_90a, where WgmmaBlock serves the head_dim.
#pragma once

#include "kernels/prefill/prefill_launch.cuh"
#include "kernels/prefill/wgmma_block.cuh"

namespace zigzag::device {

template <class T>
void launch_prefill_wgmma(const AttentionParams& p, void* stream) {
  dispatch_head_dim(p.head_dim, [&](auto head_dim) {
    if constexpr (decltype(head_dim)::value % 64 == 0) {
      launch_prefill_block<WgmmaBlock<T, decltype(head_dim)::value>>(p, stream);
    }
  });
}

}  // namespace zigzag::device
