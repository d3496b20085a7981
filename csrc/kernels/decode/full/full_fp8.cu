#include "kernels/decode/full/full_codes.cuh"

namespace zigzag::decode_full {

template void launch_decode_full_codes<Fp8, Fp8>(const AttentionParams&, void*);

}  // namespace zigzag::decode_full
