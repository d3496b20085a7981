// One plain struct per op: what a kernel is told. Filled by the bindings or by the engine, copied to the device as it
// is. Strides are in elements, sizes in tokens or heads, never in bytes unless the name says so.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/host_device.h"
#include "core/types.h"

namespace zigzag {

// Tables of the rotary position embedding that attention applies to q and k_new, or nothing (dim 0, both pointers
// null).
//
// Of each row the first `dim` dims are rotated: x * cos + rotate_half(x) * sin, where rotate_half(x) is -x[d + dim / 2]
// in the first half and x[d - dim / 2] in the second. The halves of a table need not be equal. Computed in float32,
// rounded once to the element type.
struct Rotary {
  const void* cos;  // [batch or 1, q_len, dim], entry [b, i] belongs to chunk column i
  const void* sin;
  int64_t cos_batch, cos_token, sin_batch,
      sin_token;  // strides in elements; batch stride 0 where all rows share a table
  int dim;        // a multiple of 8, at most head_dim
  DType dtype;    // float32, or the element type
};

// Which KV heads a call serves where it does not serve all of them: head h of the caches is head of[h] of q (its
// group), k_new, v_new, out and lse, whose other heads are neither read nor written. So the heads of one layer that
// need different caches take one call each, and nothing is gathered or joined. As a default: all heads, in order.
struct HeadMap {
  const int32_t* of;  // [num_kv_heads] distinct, on the device; nullptr: head h is head h
  int total;          // KV heads of q, k_new, v_new, out and lse; unused where `of` is null

  // The CPU entries check the numbers; on CUDA one that does not exist means the last head.
  ZZ_HOST_DEVICE int operator()(int head) const {
    if (of == nullptr) return head;
    const int mapped = of[head];
    return mapped >= 0 && mapped < total ? mapped : total - 1;
  }
};

// A number that no kernel of the call writes: on the device loads of it may move past other memory accesses.
ZZ_HOST_DEVICE int read_only(const int32_t* at) {
#if defined(__CUDA_ARCH__)
  return __ldg(at);
#else
  return *at;
#endif
}

// Which row of the caches each batch row attends and appends to: batch row b has cache row of[b], whose length is
// seq_lens[of[b]]. What belongs to the new tokens (q, k_new, v_new, pad, cos, sin, out, lse) is numbered by batch row.
// As a default: cache row b.
struct RowMap {
  const int32_t* of;  // [batch] on the device, distinct but for rows that are skipped; nullptr: row b is row b
  int total;          // rows of the caches, their scales and seq_lens; unused where `of` is null

  // The cache row of batch row b, or -1: that row is skipped. So is, on CUDA, a number that does not exist; the CPU
  // entries refuse those.
  ZZ_HOST_DEVICE int operator()(int b) const {
    if (of == nullptr) return b;
    const int row = read_only(of + b);
    return row >= 0 && row < total ? row : -1;
  }
};

// The format of a key or value cache. Where it is not kPlain the cache holds codes, its strides count bytes, and new
// tokens are attended as their codes too: they are the same keys whatever the chunking.
struct KvStore {
  KvFormat format;
  float* scale;          // [cache rows, num_kv_heads, slots]; nullptr where the format is kPlain
  Strides scale_stride;  // in floats
};

// Attention of `q_len` new tokens per row over the cache and over themselves, then append of those tokens to the cache.
//
// Batch row b attends cache row c = cache_rows(b), by default row b, which holds seq_lens[c] tokens before the call. Of
// its q_len chunk columns the first pad[b] are padding: they are neither attended nor appended, their output is 0 and
// their log-sum-exp -inf. Column i >= pad[b] sits at position seq_lens[c] + i - pad[b]. A row that is skipped is all
// padding. The kernel does not change seq_lens: all layers of a model share it.
//
// window == 0 marks a full cache (retrieval layer): slot = position, every earlier position is visible.
// window >= 1 marks a ring (streaming layer): see kv/ring.h for slots and for which positions are visible.
struct AttentionParams {
  const void* q;            // [batch, num_q_heads, q_len, head_dim], or more heads: see HeadMap
  const void* k_new;        // [batch, num_kv_heads, q_len, head_dim]
  const void* v_new;        // [batch, num_kv_heads, q_len, head_dim]
  void* k_cache;            // [cache rows, num_kv_heads, slots, head_dim]
  void* v_cache;            // [cache rows, num_kv_heads, slots, head_dim]
  void* out;                // [batch, num_q_heads, q_len, head_dim], dtype of q
  float* lse;               // [batch, num_q_heads, q_len] contiguous, natural logarithm
  const int32_t* seq_lens;  // [cache rows] tokens in the cache before this call
  const int32_t* pad;       // [batch] leading padding columns of this chunk; nullptr means none
  void* workspace;          // zero before its first use ever; kernels leave it reusable. Unused on the CPU
  int64_t workspace_bytes;  // at least attention_workspace_bytes() of kernels/attention.h
  Strides q_stride, k_new_stride, v_new_stride, k_cache_stride, v_cache_stride, out_stride;
  int batch, num_q_heads, num_kv_heads, q_len, head_dim;  // heads that this call serves
  int slots;      // capacity of a full cache; of a ring at least sink + window; 0: nothing is cached
  int sink;       // first tokens that a ring keeps for ever; ignored when window == 0
  int window;     // last tokens that a ring keeps, the newest one included; 0 marks a full cache
  float scale;    // factor on q . k before the softmax
  float softcap;  // logits become softcap * tanh(logit / softcap); 0: they stay what they are
  // Logits of keys without a value, one per query head of the layer: a term in the softmax's denominator, counted in
  // lse. nullptr: none.
  const float* sink_logits;
  DType dtype;    // of q, k, v, plain caches and out
  Rotary rotary;  // what is attended and appended are the rotated keys; q_len <= kMaxDecodeQueries only
  KvStore k_store, v_store;
  // Where a launch serves a part of the call's columns: how many earlier launches have attended and appended, and how
  // many later ones will. seq_lens and pad are those of the call; lse has columns_before + q_len + columns_after
  // columns.
  int columns_before, columns_after;
  HeadMap heads;
  RowMap cache_rows;

  // Columns of the call, of which this launch may serve a part.
  ZZ_HOST_DEVICE int columns() const { return columns_before + q_len + columns_after; }

  // Query heads of lse, of which `group` share a KV head.
  ZZ_HOST_DEVICE int lse_heads(int group) const { return heads.of == nullptr ? num_q_heads : heads.total * group; }
};

// Append of q_len tokens per row without attention; the fields mean what they mean in AttentionParams.
struct AppendParams {
  const void* k_new;        // [batch, num_kv_heads, q_len, head_dim]
  const void* v_new;        // [batch, num_kv_heads, q_len, head_dim]
  void* k_cache;            // [cache rows, num_kv_heads, slots, head_dim]
  void* v_cache;            // [cache rows, num_kv_heads, slots, head_dim]
  const int32_t* seq_lens;  // [cache rows]
  const int32_t* pad;       // [batch] or nullptr
  Strides k_new_stride, v_new_stride, k_cache_stride, v_cache_stride;
  int batch, num_kv_heads, q_len, head_dim, slots, sink, window;
  DType dtype;
  HeadMap heads;
  RowMap cache_rows;
  KvStore k_store, v_store;

  ZZ_HOST_DEVICE int columns() const { return q_len; }
};

// Merge of two partial attention states over disjoint key sets into the state over their union.
struct MergeParams {
  const void* out_a;   // [rows, head_dim] contiguous
  const float* lse_a;  // [rows] natural logarithm; -inf marks an empty state
  const void* out_b;
  const float* lse_b;
  void* out;
  float* lse;
  int64_t rows;  // batch * num_q_heads * q_len
  int head_dim;
  DType dtype;
};

// Leading padding columns of a chunk: what was given, within the chunk.
ZZ_HOST_DEVICE int clamp_padding(int pad, int columns) { return pad < 0 ? 0 : pad < columns ? pad : columns; }

// What a kernel needs to know of a batch row before it looks at keys.
struct ChunkRow {
  int cache_row;  // -1: the row is skipped, no cache is read or written for it
  int length;     // tokens held before the call
  int pad;        // leading padding columns of the call, in [0, columns]; all of them where the row is skipped
};

// Of batch row b. Every kernel, CPU or CUDA, takes lengths, padding and cache rows from here. `Params`: AttentionParams
// or AppendParams.
template <class Params>
ZZ_HOST_DEVICE ChunkRow chunk_row(const Params& p, int b) {
  const int row = p.cache_rows(b);
  if (p.cache_rows.of != nullptr && row < 0) return {-1, 0, p.columns()};
  const int length = read_only(p.seq_lens + row), pad = p.pad == nullptr ? 0 : read_only(p.pad + b);
  return {row, length < 0 ? 0 : length, clamp_padding(pad, p.columns())};
}

template <class Params>
constexpr bool is_quantised(const Params& p) {
  return p.k_store.format != KvFormat::kPlain || p.v_store.format != KvFormat::kPlain;
}

static_assert(std::is_trivially_copyable_v<AttentionParams>);
static_assert(std::is_trivially_copyable_v<AppendParams>);
static_assert(std::is_trivially_copyable_v<MergeParams>);

}  // namespace zigzag
