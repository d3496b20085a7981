// Attention of up to kMaxDecodeQueries new tokens over a full cache, with the append fused in: split-KV, one launch.
#pragma once

#include "core/parallel.h"
#include "core/params.h"

namespace zigzag {

void decode_full_cuda(const AttentionParams& params, void* stream);
void decode_full_cpu(const AttentionParams& params, const ParallelFor& parallel);

// Scratch for the partial states of blocks that share a head, and the counters that tell the last one to merge. Depends
// on the geometry only, so that it is allocated once; needs no GPU to compute.
int64_t decode_full_workspace_bytes(int batch, int num_q_heads, int num_kv_heads, int head_dim);

}  // namespace zigzag
