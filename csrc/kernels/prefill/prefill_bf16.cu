#include "kernels/prefill/prefill_mma.cuh"

namespace zigzag::prefill {

template void launch_prefill_mma<__nv_bfloat16>(const AttentionParams& p, void* stream);

}  // namespace zigzag::prefill
