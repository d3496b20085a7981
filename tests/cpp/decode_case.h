// One call of a decode kernel on the GPU and the same in double precision on the CPU. Slots that hold nothing, gaps
// between rows and the outputs before the call are NaN; the caches are compared bit for bit afterwards. Small enough
// for compute-sanitizer.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "core/error.h"
#include "cuda_testing.h"
#include "kernels/attention.h"
#include "kv/ring.h"

namespace zigzag::decode_test {

struct DecodeCase {
  int num_kv_heads, group, q_len, head_dim, slots, sink, window;
  std::vector<int32_t> seq_lens, pad;  // pad may be empty
  int rotary_dim = 0;                  // 0: no RoPE
  bool float_table = false;            // cos and sin in float32
  bool negative = false;               // the scale is -1 / sqrt(head_dim)

  double scale() const { return (negative ? -1.0 : 1.0) / std::sqrt(head_dim); }
};

inline std::string describe(const DecodeCase& c) {
  std::string text = concat("heads ", c.num_kv_heads, " group ", c.group, " q_len ", c.q_len, " head_dim ", c.head_dim,
                            " slots ", c.slots, " sink ", c.sink, " window ", c.window, " lengths");
  for (const int32_t length : c.seq_lens) text += concat(" ", length);
  if (c.rotary_dim > 0) text += concat(" rotary_dim ", c.rotary_dim, c.float_table ? " float32" : "");
  if (c.negative) text += " negative scale";
  return text;
}

inline double to_double(__nv_bfloat16 x) { return __bfloat162float(x); }
inline double to_double(__half x) { return __half2float(x); }
template <class T>
T from_double(double x) {
  return T(static_cast<float>(x));
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

// Host copies of every tensor of a call, with rows further apart than head_dim.
template <class T>
struct Tensors {
  DecodeCase shape;
  int batch, row;  // row: elements from token to token
  std::vector<T> q, k_new, v_new, k_cache, v_cache, out;
  std::vector<T> cos, sin;  // [batch, q_len, rotary_dim]; few bits, so that float32 rotates without rounding
  std::vector<float> lse;

  Tensors(const DecodeCase& c, unsigned seed)
      : shape(c), batch(static_cast<int>(c.seq_lens.size())), row(c.head_dim + 8) {
    std::mt19937 engine(seed);
    std::normal_distribution<double> normal;
    const T nan = from_double<T>(std::numeric_limits<double>::quiet_NaN());
    const size_t heads = static_cast<size_t>(batch) * c.num_kv_heads;
    const size_t queries = heads * c.group * c.q_len;
    q.assign(queries * row, nan), out = q, lse.assign(queries, std::nanf(""));
    k_new.assign(heads * c.q_len * row, nan), v_new = k_new;
    k_cache.assign(heads * c.slots * row, nan), v_cache = k_cache;
    const auto fill = [&](std::vector<T>& tensor, size_t token, double sigma) {
      for (int d = 0; d < c.head_dim; ++d) tensor[token * row + d] = from_double<T>(sigma * normal(engine));
    };
    for (size_t i = 0; i < queries; ++i) fill(q, i, 2.0);
    for (size_t i = 0; i < heads * c.q_len; ++i) fill(k_new, i, 1.0), fill(v_new, i, 1.0);
    for (size_t head = 0; head < heads; ++head) {
      const RingLayout layout = {c.sink, c.window, c.slots};
      for (int slot = 0; slot < c.slots; ++slot) {
        if (layout.position(slot, c.seq_lens[head / c.num_kv_heads]) < 0) continue;
        fill(k_cache, head * c.slots + slot, 1.0), fill(v_cache, head * c.slots + slot, 1.0);
      }
    }
    std::uniform_real_distribution<double> uniform(-1.0, 1.0);
    for (int i = 0; i < batch * c.q_len * c.rotary_dim; ++i) {
      cos.push_back(from_double<T>(uniform(engine))), sin.push_back(from_double<T>(uniform(engine)));
    }
  }

  // What the call means without tables: q and k_new after RoPE.
  void rotate() {
    const DecodeCase& c = shape;
    const int half = c.rotary_dim / 2;
    const auto turn = [&](std::vector<T>& tensor, int heads) {
      for (int i = 0; i < batch * heads * c.q_len; ++i) {
        const int b = i / (heads * c.q_len), column = i % c.q_len;
        T* x = &tensor[static_cast<size_t>(i) * row];
        const T *cosine = &cos[static_cast<size_t>(b * c.q_len + column) * c.rotary_dim],
                *sine = &sin[static_cast<size_t>(b * c.q_len + column) * c.rotary_dim];
        const std::vector<T> before(x, x + c.rotary_dim);
        for (int d = 0; d < c.rotary_dim; ++d) {
          const double partner = d < half ? -to_double(before[d + half]) : to_double(before[d - half]);
          x[d] = from_double<T>(to_double(before[d]) * to_double(cosine[d]) + partner * to_double(sine[d]));
        }
      }
    };
    if (c.rotary_dim > 0) turn(q, c.num_kv_heads * c.group), turn(k_new, c.num_kv_heads);
  }

  int pad(int b) const { return shape.pad.empty() ? 0 : std::clamp(shape.pad[b], 0, shape.q_len); }

  Strides strides(int heads, int tokens) const {
    return {static_cast<int64_t>(heads) * tokens * row, static_cast<int64_t>(tokens) * row, row};
  }

  // Runs the call twice on the GPU, the second time in a workspace the first has used; keeps out, lse and the caches.
  void run() {
    const DecodeCase& c = shape;
    const int num_q_heads = c.num_kv_heads * c.group;
    const DeviceArray<T> d_q(q), d_k_new(k_new), d_v_new(v_new);
    const DeviceArray<int32_t> d_lens(c.seq_lens), d_pad(c.pad);
    const int64_t bytes = attention_workspace_bytes();
    const DeviceArray<char> workspace(std::vector<char>(static_cast<size_t>(bytes), 0));
    const DeviceArray<T> d_cos(cos), d_sin(sin);
    std::vector<float> wide_cos, wide_sin;
    for (const T& x : cos) wide_cos.push_back(static_cast<float>(to_double(x)));
    for (const T& x : sin) wide_sin.push_back(static_cast<float>(to_double(x)));
    const DeviceArray<float> d_wide_cos(wide_cos), d_wide_sin(wide_sin);
    const Tensors before = *this;
    for (int repeat = 0; repeat < 2; ++repeat) {
      const DeviceArray<T> d_k(before.k_cache), d_v(before.v_cache), d_out(before.out);
      const DeviceArray<float> d_lse(before.lse);
      AttentionParams p = {};
      p.q = d_q.data(), p.k_new = d_k_new.data(), p.v_new = d_v_new.data(), p.k_cache = d_k.data(),
      p.v_cache = d_v.data();
      p.out = d_out.data(), p.lse = d_lse.data(), p.seq_lens = d_lens.data(),
      p.pad = c.pad.empty() ? nullptr : d_pad.data();
      p.workspace = workspace.data(), p.workspace_bytes = bytes;
      p.q_stride = p.out_stride = strides(num_q_heads, c.q_len);
      p.k_new_stride = p.v_new_stride = strides(c.num_kv_heads, c.q_len);
      p.k_cache_stride = p.v_cache_stride = strides(c.num_kv_heads, c.slots);
      p.batch = batch, p.num_q_heads = num_q_heads, p.num_kv_heads = c.num_kv_heads, p.q_len = c.q_len;
      p.head_dim = c.head_dim, p.slots = c.slots, p.sink = c.sink, p.window = c.window;
      p.scale = static_cast<float>(c.scale());
      p.dtype = std::is_same_v<T, __half> ? DType::kFloat16 : DType::kBFloat16;
      if (c.rotary_dim > 0) {
        Rotary& r = p.rotary;
        r.cos = c.float_table ? static_cast<const void*>(d_wide_cos.data()) : d_cos.data();
        r.sin = c.float_table ? static_cast<const void*>(d_wide_sin.data()) : d_sin.data();
        r.cos_token = r.sin_token = r.dim = c.rotary_dim;
        r.cos_batch = r.sin_batch = static_cast<int64_t>(c.q_len) * c.rotary_dim;
        r.dtype = c.float_table ? DType::kFloat32 : p.dtype;
      }
      attention_cuda(p, nullptr);
      CHECK_CUDA(cudaDeviceSynchronize());
      if (repeat == 0) {
        out = d_out.host(), lse = d_lse.host(), k_cache = d_k.host(), v_cache = d_v.host();
      } else {
        CHECK_MESSAGE(same_bits(out, d_out.host()), describe(c));
        CHECK_MESSAGE(same_bits(lse, d_lse.host()), describe(c));
      }
    }
  }
};

struct Expected {
  std::vector<double> out;
  double lse;
};

// Attention of one query row, and nothing else, in double precision.
template <class T>
Expected attend(const Tensors<T>& t, int b, int kv_head, int query_row, int query_position) {
  const DecodeCase& c = t.shape;
  const RingLayout layout = {c.sink, c.window, c.slots};
  const int first = t.pad(b), length = c.seq_lens[b], head = b * c.num_kv_heads + kv_head;
  std::vector<double> logits;
  std::vector<const T*> values;
  const auto see = [&](int position, const T* key, const T* value) {
    if (!layout.visible(position, query_position)) return;
    double dot = 0;
    for (int d = 0; d < c.head_dim; ++d)
      dot += to_double(t.q[static_cast<size_t>(query_row) * t.row + d]) * to_double(key[d]);
    logits.push_back(dot * c.scale());
    values.push_back(value);
  };
  for (int slot = 0; slot < c.slots; ++slot) {
    if (layout.position(slot, length) < 0) continue;
    const size_t at = (static_cast<size_t>(head) * c.slots + slot) * t.row;
    see(layout.position(slot, length), &t.k_cache[at], &t.v_cache[at]);
  }
  for (int column = first; column < c.q_len; ++column) {
    const size_t at = (static_cast<size_t>(head) * c.q_len + column) * t.row;
    see(length + column - first, &t.k_new[at], &t.v_new[at]);
  }
  const double highest = *std::max_element(logits.begin(), logits.end());
  Expected e = {std::vector<double>(c.head_dim, 0.0), 0.0};
  double sum = 0;
  for (size_t i = 0; i < logits.size(); ++i) {
    const double weight = std::exp(logits[i] - highest);
    sum += weight;
    for (int d = 0; d < c.head_dim; ++d) e.out[d] += weight * to_double(values[i][d]);
  }
  for (double& x : e.out) x /= sum;
  e.lse = highest + std::log(sum);
  return e;
}

template <class T>
void append(Tensors<T>& t) {
  const DecodeCase& c = t.shape;
  const RingLayout layout = {c.sink, c.window, c.slots};
  for (int head = 0; head < t.batch * c.num_kv_heads; ++head) {
    const int b = head / c.num_kv_heads, first = t.pad(b), last = c.seq_lens[b] + c.q_len - first;
    for (int position = c.seq_lens[b]; position < last; ++position) {
      const int slot = layout.slot(position), column = first + position - c.seq_lens[b];
      if (slot >= c.slots || !layout.survives(position, last)) continue;
      for (int d = 0; d < c.head_dim; ++d) {
        const size_t to = (static_cast<size_t>(head) * c.slots + slot) * t.row + d;
        const size_t from = (static_cast<size_t>(head) * c.q_len + column) * t.row + d;
        t.k_cache[to] = t.k_new[from], t.v_cache[to] = t.v_new[from];
      }
    }
  }
}

template <class T>
void check_case(const DecodeCase& c, unsigned seed) {
  INFO(describe(c));
  Tensors<T> expected(c, seed), got = expected;
  got.run();
  expected.rotate();
  const double tolerance = std::is_same_v<T, __half> ? 1e-3 : 6e-3;
  for (int row = 0; row < static_cast<int>(got.lse.size()); ++row) {
    const int column = row % c.q_len, head = row / c.q_len, b = head / (c.num_kv_heads * c.group);
    const int first = got.pad(b);
    double error = 0, norm = 0;
    if (column < first) {
      CHECK(got.lse[row] == -std::numeric_limits<float>::infinity());
      for (int d = 0; d < c.head_dim; ++d)
        error += std::abs(to_double(got.out[static_cast<size_t>(row) * got.row + d]));
      CHECK(error == 0.0);
      continue;
    }
    const int kv_head = head / c.group % c.num_kv_heads;
    const Expected e = attend(expected, b, kv_head, row, c.seq_lens[b] + column - first);
    for (int d = 0; d < c.head_dim; ++d) {
      error += std::pow(to_double(got.out[static_cast<size_t>(row) * got.row + d]) - e.out[d], 2);
      norm += e.out[d] * e.out[d];
    }
    CHECK(std::sqrt(error / norm) < tolerance);
    CHECK(got.lse[row] == doctest::Approx(e.lse).epsilon(1e-4));
    for (int d = c.head_dim; d < got.row; ++d)
      CHECK(std::isnan(to_double(got.out[static_cast<size_t>(row) * got.row + d])));
  }
  append(expected);
  CHECK(same_bits(got.k_cache, expected.k_cache));
  CHECK(same_bits(got.v_cache, expected.v_cache));
}

inline void check_both_dtypes(const std::vector<DecodeCase>& cases) {
  if (no_device()) return;
  unsigned seed = 1;
  for (const DecodeCase& c : cases) {
    check_case<__nv_bfloat16>(c, seed++);
    check_case<__half>(c, seed++);
  }
}

}  // namespace zigzag::decode_test
