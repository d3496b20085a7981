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

// Bytes of scratch that attention_cuda needs for any call: one workspace serves all layers and steps of a stream.
int64_t attention_workspace_bytes();

// Slots that attention_cuda may read in a row that holds `length` tokens after the call, of a full cache, or of a
// buffer for every position that a call with window > 0 takes as a ring (one of sink + window slots has memory for
// all): a decode kernel loads whole tiles, and in a small batch every warp starts on its first tile before it knows the
// length. What it finds past the length is never used, but a cache that commits its memory as it grows needs memory
// there. Calls with cache_rows look at the lengths first: of each of their rows they read whole tiles up to its length,
// of others nothing.
inline constexpr int kReadTile = 16;     // slots
inline constexpr int kReadAhead = 2048;  // slots: one tile for every warp of the largest cluster, or of as large a team
inline constexpr int kReadAheadBlocks = 256;  // those are launched where all blocks run at once: more than any GPU
constexpr int64_t readable_slots(int64_t length, int64_t batch, int64_t num_kv_heads) {
  const int64_t tiles = (length + kReadTile - 1) / kReadTile * kReadTile;
  const bool teams = 2 * batch * num_kv_heads <= kReadAheadBlocks;
  return teams && tiles < kReadAhead ? kReadAhead : tiles;
}

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
