// The append of one (row, KV head), shared by the append op and by attention, which appends after it has read the
// cache.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "core/params.h"
#include "kv/ring.h"

namespace zigzag::ZIGZAG_CPU_ISA {

// Leading padding columns of row b's chunk.
template <class Params>
inline int padding(const Params& p, int b) {
  return p.pad == nullptr ? 0 : std::clamp(p.pad[b], 0, p.q_len);
}

inline int64_t offset(const Strides& stride, int64_t b, int64_t head, int64_t token) {
  return b * stride.batch + head * stride.head + token * stride.token;
}

// Params: AppendParams or AttentionParams.
template <class Params>
inline void append_head(const Params& p, int b, int head) {
  const RingLayout layout{p.sink, p.window};
  const int64_t size = static_cast<int64_t>(element_size(p.dtype)), row_bytes = p.head_dim * size;
  const int new_head = p.heads(head);
  const auto copy = [&](const void* from, const Strides& from_stride, int column, void* to, const Strides& to_stride,
                        int slot) {
    std::memcpy(static_cast<char*>(to) + offset(to_stride, b, head, slot) * size,
                static_cast<const char*>(from) + offset(from_stride, b, new_head, column) * size, row_bytes);
  };
  const int pad = padding(p, b), length = p.seq_lens[b], last = length + p.q_len - pad;
  for (int position = length; position < last; ++position) {
    const int slot = layout.slot(position), column = pad + position - length;
    if (slot >= p.slots || !layout.survives(position, last)) continue;
    copy(p.k_new, p.k_new_stride, column, p.k_cache, p.k_cache_stride, slot);
    copy(p.v_new, p.v_new_stride, column, p.v_cache, p.v_cache_stride, slot);
  }
}

}  // namespace zigzag::ZIGZAG_CPU_ISA
