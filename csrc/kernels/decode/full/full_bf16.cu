#include "kernels/decode/full/full.cuh"

namespace zigzag::decode_full {

template void launch_decode_full<__nv_bfloat16>(const AttentionParams&, void*);

}  // namespace zigzag::decode_full
