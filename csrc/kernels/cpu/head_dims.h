// Which head_dim the CPU serves. Its kernels take it at run time, in whole registers of up to 16 floats; those of CUDA
// are compiled for kHeadDims of core/types.h, which are among them.
#pragma once

namespace zigzag {

inline constexpr int kCpuHeadDims[] = {64, 80, 96, 128, 192, 256, 512};
inline constexpr int kMaxHeadDim = 512;

// Throws zigzag::Error naming what has a kernel. `check_params` and `check_geometry` go by the CPU's list.
void check_cuda_head_dim(int head_dim);

}  // namespace zigzag
