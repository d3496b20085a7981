// One call of a CPU op for the tests: inputs in any dtype and layout, and a plain double-precision reference of the
// result.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "core/params.h"
#include "kv/ring.h"

namespace zigzag::testing {

inline constexpr double kInf = std::numeric_limits<double>::infinity();
inline constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};

// Largest relative error of rounding to the dtype.
inline double epsilon(DType dtype) {
  return dtype == DType::kFloat32 ? 0x1p-24 : dtype == DType::kFloat16 ? 0x1p-11 : 0x1p-8;
}

// Written for clarity, from the definition of the formats; |x| stays far from their overflow.
inline uint16_t encode16(double x, DType dtype) {
  const int mantissa = dtype == DType::kFloat16 ? 10 : 7, bias = dtype == DType::kFloat16 ? 15 : 127;
  const int sign = std::signbit(x) ? 0x8000 : 0;
  if (std::isnan(x)) return static_cast<uint16_t>(sign | ((2 * bias + 1) << mantissa) | 1);
  if (x == 0) return static_cast<uint16_t>(sign);
  const int exponent = std::max(std::ilogb(x), 1 - bias);
  const double steps = std::nearbyint(std::ldexp(std::abs(x), mantissa - exponent));  // may carry into the exponent
  return static_cast<uint16_t>(sign + ((exponent + bias - 1) << mantissa) + static_cast<int>(steps));
}

inline double decode16(uint16_t bits, DType dtype) {
  const int mantissa = dtype == DType::kFloat16 ? 10 : 7, bias = dtype == DType::kFloat16 ? 15 : 127;
  const int exponent = (bits & 0x7fff) >> mantissa, fraction = bits & ((1 << mantissa) - 1);
  double x = exponent == 0 ? std::ldexp(fraction, 1 - bias - mantissa)
                           : std::ldexp(fraction + (1 << mantissa), exponent - bias - mantissa);
  if (exponent == 2 * bias + 1) x = fraction == 0 ? kInf : std::nan("");
  return bits & 0x8000 ? -x : x;
}

inline const double* decode_table(DType dtype) {
  const auto fill = [](DType dtype) {
    std::vector<double> table(1 << 16);
    for (int i = 0; i < 1 << 16; ++i) table[i] = decode16(static_cast<uint16_t>(i), dtype);
    return table;
  };
  static const std::vector<double> kFloat16 = fill(DType::kFloat16), kBFloat16 = fill(DType::kBFloat16);
  return dtype == DType::kFloat16 ? kFloat16.data() : kBFloat16.data();
}

// [batch, heads, tokens, head_dim] in a dtype; with `by_token` stored as [batch, tokens, heads, head_dim] plus a gap
// per token.
class Tensor {
 public:
  Tensor(DType dtype, int batch, int heads, int tokens, int head_dim, bool by_token)
      : dtype_(dtype), bytes_(batch * heads * (tokens + 1) * (head_dim + 8) * element_size(dtype)) {
    const int64_t row = head_dim + (by_token ? 8 : 0);
    stride =
        by_token ? Strides{tokens * heads * row, row, heads * row} : Strides{heads * tokens * row, tokens * row, row};
    const int64_t count = static_cast<int64_t>(bytes_.size() / element_size(dtype));
    for (int64_t i = 0; i < count; ++i) write(i, std::nan(""));
  }
  void* data() { return bytes_.data(); }
  double get(int b, int h, int t, int x) const { return read(at(b, h, t, x)); }
  void set(int b, int h, int t, int x, double value) { write(at(b, h, t, x), value); }
  bool same_bytes(const Tensor& other) const { return bytes_ == other.bytes_; }

  Strides stride;

 private:
  int64_t at(int b, int h, int t, int x) const { return b * stride.batch + h * stride.head + t * stride.token + x; }
  double read(int64_t i) const {
    if (dtype_ == DType::kFloat32) return reinterpret_cast<const float*>(bytes_.data())[i];
    return decode_table(dtype_)[reinterpret_cast<const uint16_t*>(bytes_.data())[i]];
  }
  void write(int64_t i, double value) {
    if (dtype_ == DType::kFloat32) {
      reinterpret_cast<float*>(bytes_.data())[i] = static_cast<float>(value);
    } else {
      reinterpret_cast<uint16_t*>(bytes_.data())[i] = encode16(value, dtype_);
    }
  }

  DType dtype_;
  std::vector<unsigned char> bytes_;
};

struct Shape {
  int num_q_heads, num_kv_heads, head_dim, q_len, slots, sink, window;
  std::vector<int32_t> seq_lens, pad;
  bool by_token = false;
};

// Inputs of one call, outputs of the kernel, and what both should be. Slots never written hold NaN.
struct Case {
  Case(const Shape& shape, DType dtype)
      : s(shape),
        dtype(dtype),
        batch(static_cast<int>(shape.seq_lens.size())),
        q(dtype, batch, s.num_q_heads, s.q_len, s.head_dim, s.by_token),
        k_new(dtype, batch, s.num_kv_heads, s.q_len, s.head_dim, s.by_token),
        v_new(k_new),
        k_cache(dtype, batch, s.num_kv_heads, s.slots, s.head_dim, s.by_token),
        v_cache(k_cache),
        out(q),
        lse(static_cast<std::size_t>(batch) * s.num_q_heads * s.q_len, -7.0f) {
    std::mt19937 random(s.q_len * 131 + s.seq_lens[0]);
    std::normal_distribution<double> normal;
    const auto fill = [&](Tensor& to, int heads, int b, int token) {
      for (int h = 0; h < heads; ++h) {
        for (int x = 0; x < s.head_dim; ++x) to.set(b, h, token, x, normal(random));
      }
    };
    for (int b = 0; b < batch; ++b) {
      for (int t = pad(b); t < s.q_len; ++t) {
        fill(q, s.num_q_heads, b, t), fill(k_new, s.num_kv_heads, b, t), fill(v_new, s.num_kv_heads, b, t);
      }
      for (int slot = 0; slot < s.slots; ++slot) {
        if (layout().position(slot, s.seq_lens[b]) < 0) continue;
        fill(k_cache, s.num_kv_heads, b, slot), fill(v_cache, s.num_kv_heads, b, slot);
      }
    }
  }

  RingLayout layout() const { return {s.sink, s.window, s.slots}; }
  int pad(int b) const { return s.pad.empty() ? 0 : std::clamp(s.pad[b], 0, s.q_len); }

  AttentionParams params() {
    AttentionParams p = {};
    p.q = q.data(), p.k_new = k_new.data(), p.v_new = v_new.data();
    p.k_cache = k_cache.data(), p.v_cache = v_cache.data(), p.out = out.data(), p.lse = lse.data();
    p.seq_lens = s.seq_lens.data(), p.pad = s.pad.empty() ? nullptr : s.pad.data();
    p.q_stride = q.stride, p.k_new_stride = k_new.stride, p.v_new_stride = v_new.stride;
    p.k_cache_stride = k_cache.stride, p.v_cache_stride = v_cache.stride, p.out_stride = out.stride;
    p.batch = batch, p.num_q_heads = s.num_q_heads, p.num_kv_heads = s.num_kv_heads;
    p.q_len = s.q_len, p.head_dim = s.head_dim, p.slots = s.slots, p.sink = s.sink, p.window = s.window;
    p.scale = static_cast<float>(1.0 / std::sqrt(s.head_dim)), p.dtype = dtype;
    return p;
  }

  AppendParams append_params() {
    const AttentionParams a = params();
    AppendParams p = {};
    p.k_new = a.k_new, p.v_new = a.v_new, p.k_cache = a.k_cache, p.v_cache = a.v_cache, p.seq_lens = a.seq_lens,
    p.pad = a.pad;
    p.k_new_stride = a.k_new_stride, p.v_new_stride = a.v_new_stride;
    p.k_cache_stride = a.k_cache_stride, p.v_cache_stride = a.v_cache_stride;
    p.batch = a.batch, p.num_kv_heads = a.num_kv_heads, p.q_len = a.q_len, p.head_dim = a.head_dim;
    p.slots = a.slots, p.sink = a.sink, p.window = a.window, p.dtype = a.dtype;
    return p;
  }

  // Caches after the call: what of the chunk survives it, and what was there before.
  void append_reference() {
    for (int b = 0; b < batch; ++b) {
      const int last = s.seq_lens[b] + s.q_len - pad(b);
      for (int position = s.seq_lens[b]; position < last; ++position) {
        const int slot = layout().slot(position);
        if (slot >= s.slots || !layout().survives(position, last)) continue;
        for (int h = 0; h < s.num_kv_heads; ++h) {
          for (int x = 0; x < s.head_dim; ++x) {
            k_cache.set(b, h, slot, x, k_new.get(b, h, position - s.seq_lens[b] + pad(b), x));
            v_cache.set(b, h, slot, x, v_new.get(b, h, position - s.seq_lens[b] + pad(b), x));
          }
        }
      }
    }
  }

  // out and lse of one query row; its weights decide how much rounding the caller may expect.
  void attend_reference(int b, int head, int column, std::vector<double>& row, double& log_sum) const {
    const int kv_head = head / (s.num_q_heads / s.num_kv_heads), length = s.seq_lens[b];
    const int query = length + column - pad(b);
    row.assign(s.head_dim, 0.0);
    log_sum = -kInf;
    if (column < pad(b)) return;
    double sum = 0.0, high = -kInf;
    const auto add = [&](const Tensor& k, const Tensor& v, int token) {
      double logit = 0.0;
      for (int x = 0; x < s.head_dim; ++x) logit += q.get(b, head, column, x) * k.get(b, kv_head, token, x);
      logit /= std::sqrt(s.head_dim);
      const double new_high = std::max(high, logit), decay = std::exp(high - new_high),
                   weight = std::exp(logit - new_high);
      sum = sum * decay + weight;
      for (int x = 0; x < s.head_dim; ++x) row[x] = row[x] * decay + weight * v.get(b, kv_head, token, x);
      high = new_high;
    };
    for (int slot = 0; slot < s.slots; ++slot) {
      if (layout().visible(layout().position(slot, length), query)) add(k_cache, v_cache, slot);
    }
    for (int t = pad(b); t < s.q_len; ++t) {
      if (layout().visible(length + t - pad(b), query)) add(k_new, v_new, t);
    }
    for (double& x : row) x /= sum;
    log_sum = high + std::log(sum);
  }

  Shape s;
  DType dtype;
  int batch;
  Tensor q, k_new, v_new, k_cache, v_cache, out;
  std::vector<float> lse;
};

}  // namespace zigzag::testing
