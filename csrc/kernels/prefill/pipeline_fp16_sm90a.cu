#include "kernels/prefill/pipeline_plain.cuh"

namespace zigzag::prefill {

template void launch_prefill_pipeline<__half>(const AttentionParams&, const PrefillPlan&, void* stream);

}  // namespace zigzag::prefill
