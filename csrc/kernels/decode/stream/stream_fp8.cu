#include "kernels/decode/stream/stream_codes.cuh"

namespace zigzag::decode_stream {

template void launch_decode_stream_codes<Fp8, Fp8>(const AttentionParams&, void*);

}  // namespace zigzag::decode_stream
