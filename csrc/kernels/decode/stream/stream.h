// Attention of up to kMaxDecodeQueries new tokens over a sink + window ring, with the append fused in: one launch.
#pragma once

#include "core/parallel.h"
#include "core/params.h"

namespace zigzag {

void decode_stream_cuda(const AttentionParams& params, void* stream);
void decode_stream_cpu(const AttentionParams& params, const ParallelFor& parallel);

}  // namespace zigzag
