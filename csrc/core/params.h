// One plain struct per op: what a kernel is told. Filled by the bindings or by the engine, copied to the device as it
// is. Strides are in elements, sizes in tokens or heads, never in bytes unless the name says so.
#pragma once

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

// The format of a key or value cache. Where it is not kPlain the cache holds codes, its strides count bytes, and new
// tokens are attended as their codes too: they are the same keys whatever the chunking.
struct KvStore {
  KvFormat format;
  float* scale;          // [batch, num_kv_heads, slots]; nullptr where the format is kPlain
  Strides scale_stride;  // in floats
};

// Attention of `q_len` new tokens per row over the cache and over themselves, then append of those tokens to the cache.
//
// Row b holds seq_lens[b] tokens before the call. Of its q_len chunk columns the first pad[b] are padding: they are
// neither attended nor appended, their output is 0 and their log-sum-exp -inf. Column i >= pad[b] sits at position
// seq_lens[b] + i - pad[b]. The kernel does not change seq_lens: all layers of a model share it.
//
// window == 0 marks a full cache (retrieval layer): slot = position, every earlier position is visible.
// window >= 1 marks a ring (streaming layer): see kv/ring.h for slots and for which positions are visible.
struct AttentionParams {
  const void* q;            // [batch, num_q_heads, q_len, head_dim], or more heads: see HeadMap
  const void* k_new;        // [batch, num_kv_heads, q_len, head_dim]
  const void* v_new;        // [batch, num_kv_heads, q_len, head_dim]
  void* k_cache;            // [batch, num_kv_heads, slots, head_dim]
  void* v_cache;            // [batch, num_kv_heads, slots, head_dim]
  void* out;                // [batch, num_q_heads, q_len, head_dim], dtype of q
  float* lse;               // [batch, num_q_heads, q_len] contiguous, natural logarithm
  const int32_t* seq_lens;  // [batch] tokens in the cache before this call
  const int32_t* pad;       // [batch] leading padding columns of this chunk; nullptr means none
  void* workspace;          // zero before its first use ever; kernels leave it reusable. Unused on the CPU
  int64_t workspace_bytes;  // at least attention_workspace_bytes(...) of kernels/attention.h
  Strides q_stride, k_new_stride, v_new_stride, k_cache_stride, v_cache_stride, out_stride;
  int batch, num_q_heads, num_kv_heads, q_len, head_dim;  // heads that this call serves
  int slots;      // capacity of a full cache; sink + window of a ring; 0: nothing is cached
  int sink;       // first tokens that a ring keeps for ever; ignored when window == 0
  int window;     // last tokens that a ring keeps, the newest one included; 0 marks a full cache
  float scale;    // factor on q . k before the softmax
  DType dtype;    // of q, k, v, plain caches and out
  Rotary rotary;  // what is attended and appended are the rotated keys; q_len <= kMaxDecodeQueries only
  KvStore k_store, v_store;
  // Where a launch serves a part of the call's columns: how many earlier launches have attended and appended, and how
  // many later ones will. seq_lens and pad are those of the call; lse has columns_before + q_len + columns_after
  // columns.
  int columns_before, columns_after;
  HeadMap heads;

  // Query heads of lse, of which `group` share a KV head.
  ZZ_HOST_DEVICE int lse_heads(int group) const { return heads.of == nullptr ? num_q_heads : heads.total * group; }
};

// Append of q_len tokens per row without attention; the fields mean what they mean in AttentionParams.
struct AppendParams {
  const void* k_new;        // [batch, num_kv_heads, q_len, head_dim]
  const void* v_new;        // [batch, num_kv_heads, q_len, head_dim]
  void* k_cache;            // [batch, num_kv_heads, slots, head_dim]
  void* v_cache;            // [batch, num_kv_heads, slots, head_dim]
  const int32_t* seq_lens;  // [batch]
  const int32_t* pad;       // [batch] or nullptr
  Strides k_new_stride, v_new_stride, k_cache_stride, v_cache_stride;
  int batch, num_kv_heads, q_len, head_dim, slots, sink, window;
  DType dtype;
  HeadMap heads;
  KvStore k_store, v_store;
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

template <class Params>
constexpr bool is_quantised(const Params& p) {
  return p.k_store.format != KvFormat::kPlain || p.v_store.format != KvFormat::kPlain;
}

static_assert(std::is_trivially_copyable_v<AttentionParams>);
static_assert(std::is_trivially_copyable_v<AppendParams>);
static_assert(std::is_trivially_copyable_v<MergeParams>);

}  // namespace zigzag
