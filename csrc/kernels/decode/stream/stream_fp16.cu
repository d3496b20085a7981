#include "kernels/decode/stream/stream.cuh"

namespace zigzag::decode_stream {

template void launch_decode_stream<__half>(const AttentionParams&, void*);

}  // namespace zigzag::decode_stream
