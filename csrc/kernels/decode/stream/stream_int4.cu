#include "kernels/decode/stream/stream_codes.cuh"

namespace zigzag::decode_stream {

template void launch_decode_stream_codes<Int4, Int4>(const AttentionParams&, void*);

}  // namespace zigzag::decode_stream
