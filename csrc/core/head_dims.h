// Which head_dim the CPU serves. Its kernels take it at run time, in whole registers of up to 16 floats; those of CUDA
// are compiled for kHeadDims of core/types.h, which are among them.
#pragma once

#include <iterator>

namespace zigzag {

inline constexpr int kCpuHeadDims[] = {64, 80, 96, 128, 192, 256, 512};
inline constexpr int kMaxHeadDim = *(std::end(kCpuHeadDims) - 1);

}  // namespace zigzag
