// Soft caps of logits, as attention kernels apply them.
#pragma once

#include "cuda/ptx.cuh"

namespace zigzag::cuda {

// softcap * tanh(logit / softcap), both in units of log2. tanh(x) = (1 - e^-2x) / (1 + e^-2x), near 0 by its series, as
// the difference would cancel. No branch, and no more registers than a logit needs anyway.
__device__ __forceinline__ float soft_capped(float logit, float softcap) {
  const float x = logit * reciprocal_approx(softcap), square = x * x;
  const float exponent = -2.88539008177793f * x, power = exp2_approx(exponent > 60.f ? 60.f : exponent);  // keeps NaN
  const float series = x * (1.f - square * (0.333333333f - square * 0.133333333f));
  return softcap * (square < 0.01f ? series : (1.f - power) * reciprocal_approx(1.f + power));
}

}  // namespace zigzag::cuda
