// Both decode kernels on the GPU against double precision on the CPU. Slots that hold nothing, gaps between rows and
// the outputs before the call are NaN; the caches are compared bit for bit afterwards. Small enough for
// compute-sanitizer.
#include <doctest/doctest.h>

#include "kernels/attention.h"

#if ZIGZAG_WITH_CUDA
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "core/error.h"
#include "cuda_testing.h"
#include "kv/ring.h"

namespace zigzag {
namespace {

struct DecodeCase {
  int num_kv_heads, group, q_len, head_dim, slots, sink, window;
  std::vector<int32_t> seq_lens, pad;  // pad may be empty
  int rotary_dim = 0;                  // 0: no RoPE
  bool float_table = false;            // cos and sin in float32
};

std::string describe(const DecodeCase& c) {
  std::string text = concat("heads ", c.num_kv_heads, " group ", c.group, " q_len ", c.q_len, " head_dim ", c.head_dim,
                            " slots ", c.slots, " sink ", c.sink, " window ", c.window, " lengths");
  for (const int32_t length : c.seq_lens) text += concat(" ", length);
  if (c.rotary_dim > 0) text += concat(" rotary_dim ", c.rotary_dim, c.float_table ? " float32" : "");
  return text;
}

double to_double(__nv_bfloat16 x) { return __bfloat162float(x); }
double to_double(__half x) { return __half2float(x); }
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
      const int used = std::min(c.seq_lens[head / c.num_kv_heads], c.slots);
      for (int slot = 0; slot < used; ++slot)
        fill(k_cache, head * c.slots + slot, 1.0), fill(v_cache, head * c.slots + slot, 1.0);
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
      p.scale = static_cast<float>(1.0 / std::sqrt(c.head_dim));
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
  const RingLayout layout = {c.sink, c.window};
  const int first = c.pad.empty() ? 0 : c.pad[b], length = c.seq_lens[b], head = b * c.num_kv_heads + kv_head;
  std::vector<double> logits;
  std::vector<const T*> values;
  const auto see = [&](int position, const T* key, const T* value) {
    if (!layout.visible(position, query_position)) return;
    double dot = 0;
    for (int d = 0; d < c.head_dim; ++d)
      dot += to_double(t.q[static_cast<size_t>(query_row) * t.row + d]) * to_double(key[d]);
    logits.push_back(dot / std::sqrt(c.head_dim));
    values.push_back(value);
  };
  for (int slot = 0; slot < std::min(length, c.slots); ++slot) {
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
  const RingLayout layout = {c.sink, c.window};
  for (int head = 0; head < t.batch * c.num_kv_heads; ++head) {
    const int b = head / c.num_kv_heads, first = c.pad.empty() ? 0 : c.pad[b], last = c.seq_lens[b] + c.q_len - first;
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
    const int first = c.pad.empty() ? 0 : c.pad[b];
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

void check_both_dtypes(const std::vector<DecodeCase>& cases) {
  if (no_device()) return;
  unsigned seed = 1;
  for (const DecodeCase& c : cases) {
    check_case<__nv_bfloat16>(c, seed++);
    check_case<__half>(c, seed++);
  }
}

}  // namespace

// heads, group, q_len, head_dim, slots, sink, window, lengths, padding

TEST_CASE("decode_full: every head_dim, with one and two row tiles") {
  std::vector<DecodeCase> cases;
  for (const int head_dim : kHeadDims) {
    cases.push_back({2, 4, 1, head_dim, 200, 0, 0, {0, 1, 15, 16, 17, 150}, {}});
    cases.push_back({1, 3, 5, head_dim, 300, 0, 0, {290, 129}, {}});
    cases.push_back({1, 4, 7, head_dim, 300, 0, 0, {290, 129}, {}});
  }
  check_both_dtypes(cases);
}

TEST_CASE("RoPE: every head_dim, partial and whole, full caches and rings, one and several new tokens") {
  std::vector<DecodeCase> cases;
  for (const int head_dim : kHeadDims) {
    cases.push_back({2, 4, 1, head_dim, 200, 0, 0, {0, 1, 16, 150}, {}, head_dim, true});
    cases.push_back({1, 3, 5, head_dim, 300, 0, 0, {290, 129}, {}, head_dim / 2, false});
    cases.push_back({2, 4, 1, head_dim, 68, 4, 64, {0, 3, 4, 67, 68, 132, 1000}, {}, head_dim, false});
    cases.push_back({1, 5, 7, head_dim, 68, 4, 64, {0, 2, 61, 64, 1000}, {}, 8, true});
  }
  check_both_dtypes(cases);
}

TEST_CASE("RoPE: clusters, splits, many rows, padding, no free slot, no cache") {
  check_both_dtypes({
      {8, 4, 1, 128, 1100, 0, 0, {1099}, {}, 128, true},
      {8, 16, 1, 128, 64, 0, 0, {63}, {}, 72, false},
      {3, 1, 1, 96, 2000, 0, 0, {1999, 0, 7, 900}, {}, 96, false},
      {2, 16, 16, 64, 100, 0, 0, {60, 0}, {}, 64, true},
      {2, 7, 6, 128, 100, 0, 0, {50, 20, 0, 3}, {0, 6, 3, 5}, 64, false},
      {1, 4, 4, 128, 34, 0, 0, {30, 31, 34}, {}, 128, false},
      {1, 4, 1, 128, 34, 0, 0, {34, 33}, {}, 128, false},
      {2, 4, 3, 128, 0, 0, 0, {0, 0}, {}, 128, false},
      {1, 4, 16, 128, 3, 0, 3, {0, 1, 2, 50}, {}, 128, false},
      {8, 4, 1, 128, 320, 64, 256, {100, 5000}, {}, 128, true},
      {2, 16, 16, 80, 320, 64, 256, {319, 5000}, {}, 80, false},
      {2, 3, 6, 128, 40, 8, 32, {0, 39, 40, 500}, {6, 5, 0, 2}, 24, false},
      {2, 3, 1, 128, 40, 8, 32, {0, 39, 40, 500}, {1, 0, 1, 0}, 24, true},
      {64, 1, 1, 64, 48, 16, 32, {20, 47, 100}, {}, 64, false},
      {2, 4, 5, 128, 0, 8, 32, {0, 0}, {}, 64, false},
      {2, 4, 1, 128, 0, 8, 32, {0, 0}, {}, 64, false},
  });
}

TEST_CASE("decode_full: clusters and splits of a head, several heads of a block") {
  check_both_dtypes({
      {8, 4, 1, 128, 1100, 0, 0, {1099}, {}},                // one cluster per head
      {8, 4, 1, 128, 64, 0, 0, {3}, {}},                     // most blocks of the cluster have nothing
      {1, 16, 1, 64, 5000, 0, 0, {4999}, {}},                // many blocks on one head
      {3, 1, 1, 96, 2000, 0, 0, {1999, 0, 7, 900, 64}, {}},  // ragged: blocks span heads, heads span blocks
      {40, 2, 1, 80, 50, 0, 0, {49, 1, 20, 33}, {}},         // more heads than SMs
  });
}

TEST_CASE("decode_full: clusters of 16 where there are few heads") {
  check_both_dtypes({
      {4, 4, 1, 128, 1300, 0, 0, {1299}, {}},
      {4, 16, 1, 128, 1300, 0, 0, {1200}, {}, 128, true},
      {5, 7, 2, 80, 1300, 0, 0, {1298}, {}},
      {2, 3, 1, 256, 700, 0, 0, {5, 690, 0}, {}},
      {4, 4, 4, 64, 400, 0, 0, {300}, {2}},
      {4, 4, 8, 128, 1300, 0, 0, {1290}, {}},  // 32 rows
      {5, 11, 3, 80, 900, 0, 0, {897}, {1}},   // 33 rows: a second block of them
  });
}

TEST_CASE("decode_full: many rows, padding, a full cache, no cache") {
  check_both_dtypes({
      {2, 16, 16, 64, 100, 0, 0, {60, 0}, {}},
      {2, 7, 6, 128, 100, 0, 0, {50, 20, 0, 3}, {0, 6, 3, 5}},
      {1, 4, 4, 128, 34, 0, 0, {30, 31, 34}, {}},  // the last tokens find no slot
      {2, 4, 3, 128, 0, 0, 0, {0, 0}, {}},
      {2, 4, 1, 256, 0, 0, 0, {0}, {}},
  });
}

TEST_CASE("decode_stream: every head_dim, every state of the ring") {
  std::vector<DecodeCase> cases;
  for (const int head_dim : kHeadDims) {
    cases.push_back({2, 4, 1, head_dim, 68, 4, 64, {0, 3, 4, 5, 67, 68, 69, 131, 132, 133, 1000}, {}});
    cases.push_back({1, 5, 7, head_dim, 68, 4, 64, {0, 2, 61, 64, 68, 131, 1000}, {}});
  }
  check_both_dtypes(cases);
}

TEST_CASE("decode_stream: tiny rings, long rings, many rows, padding, no cache") {
  check_both_dtypes({
      {1, 4, 1, 128, 1, 0, 1, {0, 1, 2, 50}, {}},
      {1, 4, 16, 128, 3, 0, 3, {0, 1, 2, 50}, {}},  // the chunk is longer than the window
      {1, 4, 9, 64, 6, 4, 2, {0, 1, 3, 50}, {}},
      {8, 4, 1, 128, 320, 64, 256, {100, 5000}, {}},
      {2, 16, 16, 80, 320, 64, 256, {319, 5000}, {}},  // 16 row blocks read before anything is overwritten
      {2, 4, 1, 96, 4100, 100, 4000, {10, 4099, 9000}, {}},
      {64, 1, 1, 64, 48, 16, 32, {20, 47, 100}, {}},
      {2, 3, 6, 128, 40, 8, 32, {0, 39, 40, 500}, {6, 5, 0, 2}},
      {2, 3, 1, 128, 40, 8, 32, {0, 39, 40, 500}, {1, 0, 1, 0}},
      {2, 4, 5, 128, 0, 8, 32, {0, 0}, {}},
      {2, 4, 1, 128, 0, 8, 32, {0, 0}, {}},
  });
}

}  // namespace zigzag
#endif
