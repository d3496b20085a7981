#include "kernels/prefill/prefill_wgmma.cuh"

namespace zigzag::prefill {

template bool launch_prefill_wgmma<__half>(const AttentionParams& p, void* stream);

}  // namespace zigzag::prefill
