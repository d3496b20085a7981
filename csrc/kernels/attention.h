// The one entry into attention: checks the parameters, picks the kernel, launches it.
#pragma once

#include "core/parallel.h"
#include "core/params.h"

namespace zigzag {

enum class AttentionKernel { kDecodeFull, kDecodeStream, kPrefill };

constexpr const char* name(AttentionKernel kernel) {
  switch (kernel) {
    case AttentionKernel::kDecodeFull: return "decode_full";
    case AttentionKernel::kDecodeStream: return "decode_stream";
    case AttentionKernel::kPrefill: return "prefill";
  }
  return "unknown";
}

// A function of the shape alone, so that one captured graph serves every length.
constexpr AttentionKernel select_attention_kernel(int window, int q_len) {
  if (q_len > kMaxDecodeQueries) return AttentionKernel::kPrefill;
  return window == 0 ? AttentionKernel::kDecodeFull : AttentionKernel::kDecodeStream;
}

// Bytes of scratch that attention_cuda needs for any q_len, any cache length and any capacity of this geometry.
int64_t attention_workspace_bytes(int batch, int num_q_heads, int num_kv_heads, int head_dim);

// Throws zigzag::Error on head counts or a head_dim that no kernel supports, naming what was given and what is
// supported.
void check_geometry(int num_q_heads, int num_kv_heads, int head_dim);

// Throw zigzag::Error on an unsupported or inconsistent field, naming what was given and what is supported, before
// anything is launched or written.
void check_params(const AttentionParams& params);
void check_params(const AppendParams& params);
void check_params(const MergeParams& params);

// CUDA entries enqueue on `stream` (a cudaStream_t; 0 is the default stream), never synchronise and allocate nothing.
// In a build without CUDA they throw.
void attention_cuda(const AttentionParams& params, void* stream);
void append_cuda(const AppendParams& params, void* stream);
void merge_states_cuda(const MergeParams& params, void* stream);

void attention_cpu(const AttentionParams& params, const ParallelFor& parallel);
void append_cpu(const AppendParams& params, const ParallelFor& parallel);
void merge_states_cpu(const MergeParams& params, const ParallelFor& parallel);

}  // namespace zigzag
