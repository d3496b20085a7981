#include "kernels/prefill/prefill_wgmma.cuh"

namespace zigzag::prefill {

template bool launch_prefill_wgmma<__nv_bfloat16>(const AttentionParams& p, void* stream);

}  // namespace zigzag::prefill
