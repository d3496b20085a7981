// The append of one (row, KV head), shared by the append op and by attention, which appends after it has read the
// cache.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/params.h"
#include "kv/codec_cpu.h"
#include "kv/ring.h"

namespace zigzag::ZIGZAG_CPU_ISA {

inline int64_t offset(const Strides& stride, int64_t b, int64_t head, int64_t token) {
  return b * stride.batch + head * stride.head + token * stride.token;
}

// Bytes that one unit of a cache's stride stands for.
inline int64_t stride_bytes(KvFormat format, DType dtype) {
  return format == KvFormat::kPlain ? static_cast<int64_t>(element_size(dtype)) : 1;
}

// Params: AppendParams or AttentionParams.
template <class Params>
inline void append_head(const Params& p, int b, int head) {
  const ChunkRow row = chunk_row(p, b);
  const RingLayout layout{p.sink, p.window, p.slots};
  const int new_head = p.heads(head);
  const auto store = [&](const void* from, const Strides& from_stride, int column, const KvStore& to, void* cache,
                         const Strides& to_stride, int slot) {
    const int64_t source = offset(from_stride, b, new_head, column) * static_cast<int64_t>(element_size(p.dtype));
    const int64_t target = offset(to_stride, row.cache_row, head, slot) * stride_bytes(to.format, p.dtype);
    float* scale =
        to.format == KvFormat::kPlain ? nullptr : to.scale + offset(to.scale_stride, row.cache_row, head, slot);
    store_vector(p.dtype, static_cast<const char*>(from) + source, p.head_dim, to.format,
                 static_cast<char*>(cache) + target, scale);
  };
  const int last = row.length + p.q_len - row.pad;
  for (int position = row.length; position < last; ++position) {
    const int slot = layout.slot(position), column = row.pad + position - row.length;
    if (slot >= p.slots || !layout.survives(position, last)) continue;
    store(p.k_new, p.k_new_stride, column, p.k_store, p.k_cache, p.k_cache_stride, slot);
    store(p.v_new, p.v_new_stride, column, p.v_store, p.v_cache, p.v_cache_stride, slot);
  }
}

}  // namespace zigzag::ZIGZAG_CPU_ISA
