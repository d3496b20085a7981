// Tensor core fragments of the prefill kernel, as both kinds of products take them.
#pragma once

#include "cuda/ptx.cuh"

namespace zigzag::prefill {
using namespace cuda;  // PTX wrappers and the launch helper

// The weights of keys [16 * step, 16 * step + 16) as an A fragment: two accumulators, packed to 16 bits.
template <class T, int kTiles>
__device__ __forceinline__ void pack_weights(uint32_t (&fragment)[4], const float (&weights)[kTiles][4], int step) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float* pair = &weights[2 * step + i / 2][i % 2 * 2];
    fragment[i] = pack2<T>(pair[0], pair[1]);
  }
}

}  // namespace zigzag::prefill
