// RoPE on the CPU: q and k_new are rotated into buffers of their own before attention starts. Against the caches that
// it then reads they are small.
#pragma once

#include <cstring>

#include "core/parallel.h"
#include "core/params.h"
#include "core/types.h"
#include "cpu/buffer.h"
#include "cpu/vec.h"
#include "kernels/append/append_cpu.h"

namespace zigzag::ZIGZAG_CPU_ISA {

// Row [b, column] of a table as float32.
template <class Table>
inline void widen_table(const void* table, int64_t at, int dim, float* to) {
  Table padded[kMaxHeadDim] = {};  // dim need not fill the last register
  std::memcpy(padded, static_cast<const Table*>(table) + at, static_cast<std::size_t>(dim) * sizeof(Table));
  for (int x = 0; x < dim; x += Vec::kWidth) Vec::load(padded + x).store(to + x);
}

template <class T>
inline void rotate_row(const T* from, const float* cos, const float* sin, int dim, int head_dim, T* to) {
  float x[kMaxHeadDim], y[kMaxHeadDim];
  for (int d = 0; d < head_dim; d += Vec::kWidth) Vec::load(from + d).store(x + d);
  const int half = dim / 2;
  for (int d = 0; d < half; ++d) {
    y[d] = x[d] * cos[d] - x[d + half] * sin[d];
    y[d + half] = x[d + half] * cos[d + half] + x[d] * sin[d + half];
  }
  for (int d = dim; d < head_dim; ++d) y[d] = x[d];
  for (int d = 0; d < head_dim; d += Vec::kWidth) Vec::load(y + d).store(to + d);
}

// The inputs of a call after RoPE. Lives as long as the params it hands out are used.
template <class T>
class RotatedInputs {
 public:
  RotatedInputs(const AttentionParams& p, const ParallelFor& parallel)
      : p_(p),
        tokens_(static_cast<int64_t>(p.batch) * p.q_len),
        q_heads_(p.lse_heads(p.num_q_heads / p.num_kv_heads)),
        heads_(q_heads_ + (p.heads.of == nullptr ? p.num_kv_heads : p.heads.total)) {
    rows_ = allocate<T>(tokens_ * heads_ * p.head_dim);
    parallel.run(tokens_, [this](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; ++token) {
        rotate(static_cast<int>(token / p_.q_len), static_cast<int>(token % p_.q_len));
      }
    });
  }

  AttentionParams params() const {
    AttentionParams p = p_;
    const int64_t token = static_cast<int64_t>(heads_) * p.head_dim;
    p.q = rows_.get(), p.k_new = rows_.get() + static_cast<int64_t>(q_heads_) * p.head_dim;
    p.q_stride = p.k_new_stride = {p.q_len * token, p.head_dim, token};
    p.rotary = {};
    return p;
  }

 private:
  void rotate(int b, int column) {
    const Rotary& r = p_.rotary;
    float cos[kMaxHeadDim], sin[kMaxHeadDim];
    const auto widen = [&](auto table) {
      widen_table<decltype(table)>(r.cos, b * r.cos_batch + column * r.cos_token, r.dim, cos);
      widen_table<decltype(table)>(r.sin, b * r.sin_batch + column * r.sin_token, r.dim, sin);
    };
    dispatch_dtype(r.dtype, widen);
    T* to = rows_.get() + (static_cast<int64_t>(b) * p_.q_len + column) * heads_ * p_.head_dim;
    for (int head = 0; head < heads_; ++head, to += p_.head_dim) {
      const bool is_q = head < q_heads_;
      const T* from = static_cast<const T*>(is_q ? p_.q : p_.k_new);
      from += is_q ? offset(p_.q_stride, b, head, column) : offset(p_.k_new_stride, b, head - q_heads_, column);
      rotate_row(from, cos, sin, r.dim, p_.head_dim, to);
    }
  }

  const AttentionParams& p_;
  const int64_t tokens_;
  const int q_heads_, heads_;  // of q, and of q and k_new: all of them, also those that the call does not serve
  Buffer<T> rows_;             // [batch, q_len, heads_, head_dim]
};

}  // namespace zigzag::ZIGZAG_CPU_ISA
