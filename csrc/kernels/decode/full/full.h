// Attention of up to kMaxDecodeQueries new tokens over a full cache, with the append fused in: split-KV, one launch.
#pragma once

#include "core/parallel.h"
#include "core/params.h"

namespace zigzag {

void decode_full_cuda(const AttentionParams& params, void* stream);
void decode_full_cpu(const AttentionParams& params, const ParallelFor& parallel);

// Scratch for the partial states of blocks that share a head, and the counters that tell the last one to merge: enough
// for every call. Needs no GPU to compute.
int64_t decode_full_workspace_bytes();

}  // namespace zigzag
