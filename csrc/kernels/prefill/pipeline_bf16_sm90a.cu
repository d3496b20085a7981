#include "kernels/prefill/pipeline_plain.cuh"

namespace zigzag::prefill {

template void launch_prefill_pipeline<__nv_bfloat16>(const AttentionParams&, const PrefillPlan&, void* stream);

}  // namespace zigzag::prefill
