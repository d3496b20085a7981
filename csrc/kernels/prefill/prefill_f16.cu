#include "kernels/prefill/prefill_launch.cuh"

namespace zigzag::device {

template void launch_prefill<__half>(const AttentionParams& p, void* stream);

}  // namespace zigzag::device
