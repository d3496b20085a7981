// Geometry of one thread block of the prefill kernel: tile sizes, and which queries and keys the block owns.
#pragma once

#include "core/params.h"
#include "kernels/prefill/key_range.h"

namespace zigzag::device {

// Rows of a tile are (chunk column, query head of the group) pairs of one KV head, heads fastest, so that K and V are
// read once per KV head whatever the group size.
template <int kHeadDim>
struct PrefillShape {
  static constexpr bool kWide = kHeadDim > 128;  // two row tiles of output would not fit in the registers
  static constexpr int kRowTiles =
      kWide ? 1 : 2;  // 16-row tensor core tiles per warp: two halve the shared memory reads
  static constexpr int kWarps = 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kBlocksPerSm = kHeadDim <= 64 ? 3 : 2;  // as many as the registers hold without spilling
  static constexpr int kRows = 16 * kRowTiles * kWarps;
  static constexpr int kKeys = kWide ? 32 : 64;  // keys per step; 32 keeps head_dim 256 within 99 KB (sm_86, sm_89)
  static constexpr int kChunks = kHeadDim / 8;   // 16-byte chunks per row
  // ldmatrix reads 8 rows at once; they hit 8 different bank groups because chunks are permuted by an XOR with the row,
  // or, where a row is not a multiple of 128 bytes, because rows are padded by 16 bytes.
  static constexpr bool kSwizzle = kHeadDim % 64 == 0;
  // Threads that load one row together: a power of two that divides kChunks, at most a 128-byte line.
  static constexpr int kThreadsPerRow = kChunks % 8 == 0 ? 8 : kChunks % 4 == 0 ? 4 : 2;
  static constexpr int kRowBytes = kHeadDim * 2 + (kSwizzle ? 0 : 16);
  static constexpr int kKeyBytes = kKeys * kRowBytes;                     // one K or V buffer
  static constexpr int kSharedBytes = kRows * kRowBytes + 4 * kKeyBytes;  // Q, then two stages of K and V

  // Byte offset of a 16-byte chunk in a tile.
  static __device__ __forceinline__ int offset(int row, int chunk) {
    return row * kRowBytes + ((kSwizzle ? chunk ^ (row & 7) : chunk) << 4);
  }

  // offset(row, chunk + 2 * step) from offset(row, chunk), for chunk 0 or 1.
  static __device__ __forceinline__ int advance(int chunk_offset, int step) {
    return kSwizzle ? chunk_offset ^ (step << 5) : chunk_offset + (step << 5);
  }
};

// Keys and values of one row and KV head: the cache, or the chunk.
struct KeySource {
  const char* k;
  const char* v;
  int64_t k_bytes, v_bytes;  // from one token to the next
};

struct QueryTile {
  int batch, group;
  int kv_head;  // of q (its group), k_new, v_new, out and lse
  int length;   // tokens cached before the call
  int pad;
  int first_column, first_member;  // of row 0: its chunk column and its head within the group
  int reciprocal;                  // 65536 / group, rounded up: exact division of the numbers below 256 that occur here
  KeyRange keys;
  KeySource source[2];  // [0] the chunk, [1] the cache

  __device__ __forceinline__ int column(int row) const {
    return first_column + (((first_member + row) * reciprocal) >> 16);
  }
  __device__ __forceinline__ int head(int row) const {
    return kv_head * group + first_member + row - (column(row) - first_column) * group;
  }
  __device__ __forceinline__ int position(int column) const { return length + column - pad; }

  __device__ __forceinline__ KeySource key_source(const void* k, const Strides& k_stride, const void* v,
                                                  const Strides& v_stride, int head) const {
    constexpr int kElementBytes = 2;  // float16 and bfloat16
    const int64_t k_head = batch * k_stride.batch + head * k_stride.head;
    const int64_t v_head = batch * v_stride.batch + head * v_stride.head;
    return {static_cast<const char*>(k) + k_head * kElementBytes, static_cast<const char*>(v) + v_head * kElementBytes,
            k_stride.token * kElementBytes, v_stride.token * kElementBytes};
  }

  // Blocks are numbered with the KV head fastest and the last columns, which see the most keys, first: heavy blocks
  // start early.
  static __device__ __forceinline__ QueryTile of_block(const AttentionParams& p, int rows_per_tile) {
    QueryTile tile;
    tile.group = p.num_q_heads / p.num_kv_heads;
    const int num_tiles = (p.q_len * tile.group + rows_per_tile - 1) / rows_per_tile;
    const int pair = blockIdx.x / p.num_kv_heads;
    const int cache_head = blockIdx.x - pair * p.num_kv_heads;
    tile.kv_head = p.heads(cache_head);
    tile.batch = pair % p.batch;
    const int first_row = (num_tiles - 1 - pair / p.batch) * rows_per_tile;
    tile.first_column = first_row / tile.group;
    tile.first_member = first_row - tile.first_column * tile.group;
    tile.reciprocal = 65536 / tile.group + 1;
    tile.source[0] = tile.key_source(p.k_new, p.k_new_stride, p.v_new, p.v_new_stride, tile.kv_head);
    tile.source[1] = tile.key_source(p.k_cache, p.k_cache_stride, p.v_cache, p.v_cache_stride, cache_head);

    const RingLayout layout{p.sink, p.window};
    tile.length = max(0, p.seq_lens[tile.batch]);
    if (layout.is_full()) tile.length = min(tile.length, p.slots);
    tile.pad = p.pad == nullptr ? 0 : p.pad[tile.batch];
    const int first = max(tile.first_column, tile.pad);
    const int last = min(tile.column(rows_per_tile - 1), p.q_len - 1);
    if (last < first) {
      tile.keys = {};
    } else {
      tile.keys = KeyRange::of(layout, p.slots == 0 ? tile.length : 0, tile.position(first), tile.position(last));
    }
    return tile;
  }
};

}  // namespace zigzag::device
