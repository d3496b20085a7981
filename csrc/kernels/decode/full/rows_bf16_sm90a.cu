#include "kernels/decode/full/rows_pipeline.cuh"

namespace zigzag::decode_full {

template bool launch_decode_rows<__nv_bfloat16>(const AttentionParams&, void*);

}  // namespace zigzag::decode_full
