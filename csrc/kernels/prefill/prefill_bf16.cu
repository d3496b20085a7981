#include "kernels/prefill/prefill_launch.cuh"

namespace zigzag::device {

template void launch_prefill<__nv_bfloat16>(const AttentionParams& p, void* stream);

}  // namespace zigzag::device
