#include "kernels/prefill/pipeline_codes.cuh"

namespace zigzag::prefill {

template void launch_prefill_codes<Int4, Int4>(const AttentionParams&, const PrefillPlan&, void* stream);

}  // namespace zigzag::prefill
