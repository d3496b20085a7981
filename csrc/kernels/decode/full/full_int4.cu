#include "kernels/decode/full/full_codes.cuh"

namespace zigzag::decode_full {

template void launch_decode_full_codes<Int4, Int4>(const AttentionParams&, void*);

}  // namespace zigzag::decode_full
