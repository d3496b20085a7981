// Where attention on the CPU reads keys or values: the cache, and the new tokens of the call in the cache's format.
#pragma once

#include "core/parallel.h"
#include "cpu/buffer.h"
#include "kernels/append/append_cpu.h"
#include "kv/codec_cpu.h"

namespace zigzag::ZIGZAG_CPU_ISA {

// Keys or values of a call. New tokens of a quantised cache are encoded once, into a buffer of its own; appending
// encodes them again, to the same codes.
class KvRows {
 public:
  KvRows(const AttentionParams& p, const KvStore& store, const void* cache, const Strides& cache_stride,
         const void* fresh, const Strides& fresh_stride, const ParallelFor& parallel)
      : store_(store),
        heads_(p.heads),
        cache_(static_cast<const char*>(cache)),
        fresh_(static_cast<const char*>(fresh)) {
    cache_stride_ = scaled(cache_stride, stride_bytes(store.format, p.dtype));
    fresh_stride_ = scaled(fresh_stride, static_cast<int64_t>(element_size(p.dtype)));
    if (store.format != KvFormat::kPlain) encode(p, parallel);
  }

  bool is_plain() const { return store_.format == KvFormat::kPlain; }

  // Vectors of (cache row or batch row b, head of the cache) from slot or column `row` on.
  VectorRows rows(bool cached, int b, int head, int row) const {
    const Strides& stride = cached ? cache_stride_ : fresh_stride_;
    const Strides& scale_stride = cached ? store_.scale_stride : fresh_scale_stride_;
    const float* scale = cached ? store_.scale : fresh_scales_.get();
    if (scale != nullptr) scale += offset(scale_stride, b, head, row);
    const int at = cached || !is_plain() ? head : heads_(head);  // codes of new tokens are those of the heads served
    return {store_.format, (cached ? cache_ : fresh_) + offset(stride, b, at, row), stride.token, scale,
            scale_stride.token};
  }

 private:
  static Strides scaled(const Strides& s, int64_t factor) {
    return {s.batch * factor, s.head * factor, s.token * factor};
  }

  void encode(const AttentionParams& p, const ParallelFor& parallel) {
    const int64_t heads = static_cast<int64_t>(p.batch) * p.num_kv_heads;
    const int64_t bytes = vector_bytes(store_.format, p.dtype, p.head_dim);
    fresh_codes_ = allocate<char>(heads * p.q_len * bytes);
    fresh_scales_ = allocate<float>(heads * p.q_len);
    parallel.run(heads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int b = static_cast<int>(i / p.num_kv_heads), head = static_cast<int>(i % p.num_kv_heads);
        for (int column = chunk_row(p, b).pad; column < p.q_len; ++column) {
          const int64_t at = i * p.q_len + column;
          store_vector(p.dtype, fresh_ + offset(fresh_stride_, b, p.heads(head), column), p.head_dim, store_.format,
                       fresh_codes_.get() + at * bytes, fresh_scales_.get() + at);
        }
      }
    });
    fresh_ = fresh_codes_.get();
    fresh_stride_ = {p.num_kv_heads * p.q_len * bytes, p.q_len * bytes, bytes};
    fresh_scale_stride_ = {static_cast<int64_t>(p.num_kv_heads) * p.q_len, p.q_len, 1};
  }

  const KvStore store_;
  const HeadMap heads_;
  const char *cache_, *fresh_;
  Strides cache_stride_, fresh_stride_;  // bytes
  Strides fresh_scale_stride_ = {};
  Buffer<char> fresh_codes_;
  Buffer<float> fresh_scales_;
};

}  // namespace zigzag::ZIGZAG_CPU_ISA
