// Which queries and keys a thread block of the prefill kernel owns.
#pragma once

#include "core/params.h"
#include "kv/key_range.h"

namespace zigzag::prefill {
using namespace cuda;  // PTX wrappers and the launch helper

// Rows of a tile are (chunk column, query head of the group) pairs of one KV head, heads fastest, so that K and V are
// read once per KV head whatever the group size.

// Keys and values of one row and KV head: the cache, or the chunk.
struct KeySource {
  const char* k;
  const char* v;
  int64_t k_bytes, v_bytes;  // from one token to the next
};

struct QueryTile {
  int batch, group;
  int kv_head;                // of q (its group), k_new, v_new, out and lse
  int cache_head, cache_row;  // of the caches; row 0 where the row is skipped, of which nothing is read
  int length;                 // tokens cached before the call
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

  static __device__ __forceinline__ KeySource key_source(const void* k, const Strides& k_stride, const void* v,
                                                         const Strides& v_stride, int row, int head) {
    constexpr int kElementBytes = 2;  // float16 and bfloat16
    const int64_t k_head = row * k_stride.batch + head * k_stride.head;
    const int64_t v_head = row * v_stride.batch + head * v_stride.head;
    return {static_cast<const char*>(k) + k_head * kElementBytes, static_cast<const char*>(v) + v_head * kElementBytes,
            k_stride.token * kElementBytes, v_stride.token * kElementBytes};
  }

  // Blocks are numbered with the KV head fastest and the last columns, which see the most keys, first: heavy blocks
  // start early.
  static __device__ __forceinline__ QueryTile of_block(const AttentionParams& p, int rows_per_tile,
                                                       int block = blockIdx.x) {
    const int num_tiles = (p.q_len * (p.num_q_heads / p.num_kv_heads) + rows_per_tile - 1) / rows_per_tile;
    const int pair = block / p.num_kv_heads;
    const int cache_head = block - pair * p.num_kv_heads;
    return of(p, pair % p.batch, cache_head, (num_tiles - 1 - pair / p.batch) * rows_per_tile, rows_per_tile);
  }

  // Rows [first_row, first_row + rows_per_tile) of a batch row and a KV head of the caches.
  static __device__ __forceinline__ QueryTile of(const AttentionParams& p, int batch, int cache_head, int first_row,
                                                 int rows_per_tile) {
    QueryTile tile;
    tile.group = p.num_q_heads / p.num_kv_heads;
    tile.kv_head = p.heads(cache_head);
    tile.cache_head = cache_head;
    tile.batch = batch;
    tile.first_column = first_row / tile.group;
    tile.first_member = first_row - tile.first_column * tile.group;
    tile.reciprocal = 65536 / tile.group + 1;
    const ChunkRow row = chunk_row(p, tile.batch);
    tile.cache_row = max(row.cache_row, 0);
    tile.source[0] = key_source(p.k_new, p.k_new_stride, p.v_new, p.v_new_stride, tile.batch, tile.kv_head);
    tile.source[1] = key_source(p.k_cache, p.k_cache_stride, p.v_cache, p.v_cache_stride, tile.cache_row, cache_head);

    const RingLayout layout{p.sink, p.window, p.slots};
    tile.length = layout.is_full() ? min(row.length, p.slots) : row.length;
    tile.pad = row.pad;
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

}  // namespace zigzag::prefill
