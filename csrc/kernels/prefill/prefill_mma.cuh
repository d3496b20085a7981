// Launch of the prefill kernel on mma.sync, for every head_dim.
#pragma once

#include "kernels/prefill/mma_block.cuh"
#include "kernels/prefill/prefill_launch.cuh"

namespace zigzag::prefill {

template <class T>
void launch_prefill_mma(const AttentionParams& p, void* stream) {
  dispatch_head_dim(p.head_dim,
                    [&](auto head_dim) { launch_prefill_block<MmaBlock<T, decltype(head_dim)::value>>(p, stream); });
}

}  // namespace zigzag::prefill
