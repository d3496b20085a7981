// Every CPU op against a plain double-precision reference, for each dtype, each instruction set that this processor runs
// (forced through ZIGZAG_CPU_ISA) and 1 and 3 threads.
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "core/error.h"
#include "core/thread_pool.h"
#include "device/cpu_isa.h"
#include "doctest/doctest.h"
#include "kernels/attention.h"
#include "kv/ring.h"

using namespace zigzag;

namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};

// Largest relative error of rounding to the dtype.
double epsilon(DType dtype) { return dtype == DType::kFloat32 ? 0x1p-24 : dtype == DType::kFloat16 ? 0x1p-11 : 0x1p-8; }

// Written for clarity, from the definition of the formats; |x| stays far from their overflow.
uint16_t encode16(double x, DType dtype) {
  const int mantissa = dtype == DType::kFloat16 ? 10 : 7, bias = dtype == DType::kFloat16 ? 15 : 127;
  const int sign = std::signbit(x) ? 0x8000 : 0;
  if (std::isnan(x)) return static_cast<uint16_t>(sign | ((2 * bias + 1) << mantissa) | 1);
  if (x == 0) return static_cast<uint16_t>(sign);
  const int exponent = std::max(std::ilogb(x), 1 - bias);
  const double steps = std::nearbyint(std::ldexp(std::abs(x), mantissa - exponent));  // may carry into the exponent
  return static_cast<uint16_t>(sign + ((exponent + bias - 1) << mantissa) + static_cast<int>(steps));
}

double decode16(uint16_t bits, DType dtype) {
  const int mantissa = dtype == DType::kFloat16 ? 10 : 7, bias = dtype == DType::kFloat16 ? 15 : 127;
  const int exponent = (bits & 0x7fff) >> mantissa, fraction = bits & ((1 << mantissa) - 1);
  double x = exponent == 0 ? std::ldexp(fraction, 1 - bias - mantissa)
                           : std::ldexp(fraction + (1 << mantissa), exponent - bias - mantissa);
  if (exponent == 2 * bias + 1) x = fraction == 0 ? kInf : std::nan("");
  return bits & 0x8000 ? -x : x;
}

const double* decode_table(DType dtype) {
  const auto fill = [](DType dtype) {
    std::vector<double> table(1 << 16);
    for (int i = 0; i < 1 << 16; ++i) table[i] = decode16(static_cast<uint16_t>(i), dtype);
    return table;
  };
  static const std::vector<double> kFloat16 = fill(DType::kFloat16), kBFloat16 = fill(DType::kBFloat16);
  return dtype == DType::kFloat16 ? kFloat16.data() : kBFloat16.data();
}

// [batch, heads, tokens, head_dim] in a dtype; with `by_token` stored as [batch, tokens, heads, head_dim] plus a gap per token.
class Tensor {
 public:
  Tensor(DType dtype, int batch, int heads, int tokens, int head_dim, bool by_token)
      : dtype_(dtype), bytes_(batch * heads * (tokens + 1) * (head_dim + 8) * element_size(dtype)) {
    const int64_t row = head_dim + (by_token ? 8 : 0);
    stride = by_token ? Strides{tokens * heads * row, row, heads * row} : Strides{heads * tokens * row, tokens * row, row};
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

  RingLayout layout() const { return {s.sink, s.window}; }
  int pad(int b) const { return s.pad.empty() ? 0 : s.pad[b]; }

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
    p.k_new = a.k_new, p.v_new = a.v_new, p.k_cache = a.k_cache, p.v_cache = a.v_cache, p.seq_lens = a.seq_lens, p.pad = a.pad;
    p.k_new_stride = a.k_new_stride, p.v_new_stride = a.v_new_stride;
    p.k_cache_stride = a.k_cache_stride, p.v_cache_stride = a.v_cache_stride;
    p.batch = a.batch, p.num_kv_heads = a.num_kv_heads, p.q_len = a.q_len, p.head_dim = a.head_dim;
    p.slots = a.slots, p.sink = a.sink, p.window = a.window, p.dtype = a.dtype;
    return p;
  }

  // Caches after the call: what each slot holds at the new length, from the chunk or from before.
  void append_reference() {
    for (int b = 0; b < batch; ++b) {
      for (int slot = 0; slot < s.slots; ++slot) {
        const int position = layout().position(slot, s.seq_lens[b] + s.q_len - pad(b));
        if (position < s.seq_lens[b]) continue;
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
      const double new_high = std::max(high, logit), decay = std::exp(high - new_high), weight = std::exp(logit - new_high);
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

// f(dtype) for every dtype.
template <class F>
void for_dtypes(F&& f) {
  for (DType dtype : kDTypes) {
    INFO(name(dtype));
    f(dtype);
  }
}

// f(parallel) for every instruction set of this processor, with 1 and 3 threads.
template <class F>
void for_builds(F&& f) {
  static const ParallelFor kPools[] = {ParallelFor{}, make_thread_pool(3)};
  for (CpuIsa isa : {CpuIsa::kBaseline, CpuIsa::kAvx2, CpuIsa::kAvx512}) {
    if (!cpu_supports(isa)) continue;
    setenv("ZIGZAG_CPU_ISA", name(isa), 1);
    for (const ParallelFor& pool : kPools) {
      INFO(name(isa), " threads ", pool.num_threads);
      f(pool);
    }
  }
  unsetenv("ZIGZAG_CPU_ISA");
}

void check_attention(const Shape& shape, DType dtype) {
  const Case input(shape, dtype);
  Case expected = input;
  std::vector<std::vector<double>> rows(input.lse.size());
  std::vector<double> log_sums(input.lse.size());
  const auto row_index = [&](int b, int h, int t) { return (b * shape.num_q_heads + h) * shape.q_len + t; };
  const auto for_rows = [&](auto&& f) {
    for (int b = 0; b < input.batch; ++b) {
      for (int h = 0; h < shape.num_q_heads; ++h) {
        for (int t = 0; t < shape.q_len; ++t) f(b, h, t, row_index(b, h, t));
      }
    }
  };
  for_rows([&](int b, int h, int t, int i) { input.attend_reference(b, h, t, rows[i], log_sums[i]); });
  expected.append_reference();
  for_builds([&](const ParallelFor& parallel) {
    Case actual = input;
    attention_cpu(actual.params(), parallel);
    double worst_out = 0.0, worst_lse = 0.0;
    bool finite = true;
    for_rows([&](int b, int h, int t, int i) {
      const bool empty = log_sums[i] == -kInf;
      finite = finite && (empty ? actual.lse[i] == -kInf : std::isfinite(actual.lse[i]));
      if (!empty) worst_lse = std::max(worst_lse, std::abs(actual.lse[i] - log_sums[i]));
      for (int x = 0; x < shape.head_dim; ++x) {
        const double y = actual.out.get(b, h, t, x);
        finite = finite && std::isfinite(y) && (!empty || y == 0.0);
        worst_out = std::max(worst_out, std::abs(y - rows[i][x]) / (1.0 + std::abs(rows[i][x])));
      }
    });
    CHECK(finite);
    CHECK(worst_out < epsilon(dtype) + 3e-6);  // one rounding of the result, float arithmetic before it
    CHECK(worst_lse < 5e-6);
    CHECK(actual.k_cache.same_bytes(expected.k_cache));
    CHECK(actual.v_cache.same_bytes(expected.v_cache));
  });
}

void check_all(const std::vector<Shape>& shapes) {
  for (const Shape& s : shapes) {
    INFO("heads ", s.num_q_heads, "/", s.num_kv_heads, " head_dim ", s.head_dim, " q_len ", s.q_len, " slots ", s.slots);
    INFO("sink ", s.sink, " window ", s.window, " seq_len ", s.seq_lens[0]);
    for_dtypes([&](DType dtype) { check_attention(s, dtype); });
  }
}

}  // namespace

TEST_CASE("decode over a full cache") {
  check_all({
      {4, 1, 64, 1, 8, 0, 0, {0}, {}},                    // nothing cached
      {1, 1, 80, 1, 64, 0, 0, {63, 64, 1}, {}},           // last free slot; no free slot; a group of 1
      {6, 2, 96, 1, 130, 0, 0, {127, 128, 129}, {}},      // edges of a tile, a group of 3
      {10, 2, 64, 1, 70, 0, 0, {65, 3}, {}, true},        // a group of 5, strided tensors
      {16, 1, 128, 1, 300, 0, 0, {257, 0}, {}},           // a group of 16
      {8, 8, 256, 2, 70, 0, 0, {66}, {}, true},
      {14, 2, 64, 3, 1100, 0, 0, {1090, 700}, {}},        // several splits, q_len > 1
      {16, 1, 64, 16, 600, 0, 0, {520, 5}, {0, 13}},      // the largest block of rows, padding
      {4, 2, 64, 4, 40, 0, 0, {20, 30}, {4, 2}},          // a row that is nothing but padding
      {4, 2, 64, 4, 10, 0, 0, {8, 10}, {}},               // past the capacity: attended, not appended
      {4, 2, 64, 5, 0, 0, 0, {0, 9}, {}},                 // no cache at all
  });
}

TEST_CASE("decode over a ring") {
  std::vector<Shape> shapes;
  for (int length : {0, 1, 3, 4, 11, 12, 13, 14, 19, 20, 21, 100}) {
    shapes.push_back({8, 2, 64, 1, 12, 4, 8, {length, length + 5}, {}});
    shapes.push_back({3, 1, 80, 5, 12, 4, 8, {length}, {}});
    shapes.push_back({2, 2, 64, 11, 8, 0, 8, {length, length}, {0, 4}});  // a chunk longer than the window
  }
  shapes.push_back({8, 2, 128, 1, 320, 64, 256, {1000, 319, 321, 63}, {}, true});
  shapes.push_back({7, 1, 96, 16, 1400, 100, 1300, {5000}, {}});  // several splits
  shapes.push_back({4, 2, 64, 2, 1, 0, 1, {17}, {}});             // a window that sees only the token itself
  shapes.push_back({4, 2, 64, 6, 0, 2, 3, {17}, {}});             // no cache
  check_all(shapes);
}

TEST_CASE("prefill") {
  check_all({
      {4, 1, 64, 17, 64, 0, 0, {0}, {}},
      {4, 2, 64, 150, 200, 0, 0, {0, 37}, {}, true},   // continues a cache
      {9, 3, 64, 130, 131, 0, 0, {0, 1}, {70, 130}},   // left padding across blocks; nothing but padding
      {16, 1, 80, 40, 30, 0, 0, {5}, {}},              // past the capacity
      {1, 1, 256, 100, 0, 0, 0, {0}, {}},              // no cache
      {2, 2, 96, 33, 700, 0, 0, {650}, {}},            // keys split among threads
      {4, 2, 64, 100, 12, 4, 8, {0, 3}, {}},           // ring, chunk much longer than the window
      {4, 2, 64, 100, 12, 4, 8, {11, 50}, {7, 95}},
      {6, 2, 128, 90, 84, 20, 64, {200, 10}, {}, true},
      {2, 1, 64, 70, 70, 0, 70, {33}, {}},             // window ends inside the cached part
      {3, 1, 64, 40, 0, 3, 5, {8}, {}},                // ring without a cache
  });
}

TEST_CASE("append writes the same bytes as attention and nothing else") {
  for_dtypes([](DType dtype) {
    for (const Shape& shape : {Shape{2, 2, 64, 5, 9, 0, 0, {2, 7}, {1, 0}}, Shape{2, 2, 64, 20, 7, 2, 5, {0, 31}, {}, true},
                               Shape{2, 1, 80, 3, 7, 2, 5, {6, 1}, {3, 1}}, Shape{2, 1, 80, 3, 0, 2, 5, {6}, {}}}) {
      const Case input(shape, dtype);
      Case expected = input;
      expected.append_reference();
      for_builds([&](const ParallelFor& parallel) {
        Case actual = input;
        append_cpu(actual.append_params(), parallel);
        CHECK(actual.k_cache.same_bytes(expected.k_cache));
        CHECK(actual.v_cache.same_bytes(expected.v_cache));
      });
    }
  });
}

TEST_CASE("merge of two states is the state over both key sets; an empty state counts for nothing") {
  constexpr int kRows = 5, kHeadDim = 80;
  const float inf = std::numeric_limits<float>::infinity();
  const std::vector<float> lse_a = {1.5f, -inf, 300.0f, -inf, -2.0f}, lse_b = {0.5f, 2.0f, -300.0f, -inf, 30.0f};
  for_dtypes([&](DType dtype) {
    Tensor a(dtype, 1, 1, kRows, kHeadDim, false), b(a), out(a);
    for (int r = 0; r < kRows; ++r) {
      for (int x = 0; x < kHeadDim; ++x) {
        if (lse_a[r] != -inf) a.set(0, 0, r, x, std::sin(r + 3.0 * x));  // out of an empty state stays NaN
        if (lse_b[r] != -inf) b.set(0, 0, r, x, std::cos(r - 2.0 * x));
      }
    }
    for_builds([&](const ParallelFor& parallel) {
      std::vector<float> lse(kRows, -7.0f);
      merge_states_cpu({a.data(), lse_a.data(), b.data(), lse_b.data(), out.data(), lse.data(), kRows, kHeadDim, dtype}, parallel);
      for (int r = 0; r < kRows; ++r) {
        const double high = std::max(lse_a[r], lse_b[r]);
        const double sum = high == -kInf ? 0.0 : std::exp(lse_a[r] - high) + std::exp(lse_b[r] - high);
        CHECK((sum == 0.0 ? lse[r] == -inf : std::abs(lse[r] - high - std::log(sum)) < 1e-6 * (1.0 + std::abs(high))));
        for (int x = 0; x < kHeadDim; ++x) {
          double y = 0.0;
          if (lse_a[r] != -inf) y += std::exp(lse_a[r] - high) / sum * a.get(0, 0, r, x);
          if (lse_b[r] != -inf) y += std::exp(lse_b[r] - high) / sum * b.get(0, 0, r, x);
          CHECK(std::abs(out.get(0, 0, r, x) - y) < epsilon(dtype) + 1e-6);
        }
      }
    });
  });
}

TEST_CASE("results are the same bits for any number of threads") {
  const ParallelFor many = make_thread_pool(5);
  for (const Shape& shape : {Shape{8, 2, 64, 1, 3000, 0, 0, {2999, 1500}, {}}, Shape{4, 2, 64, 300, 400, 0, 0, {50}, {}},
                             Shape{4, 2, 64, 2, 1300, 10, 1290, {4000}, {}}}) {
    Case one(shape, DType::kBFloat16), five(shape, DType::kBFloat16);
    attention_cpu(one.params(), ParallelFor{});
    attention_cpu(five.params(), many);
    CHECK(one.out.same_bytes(five.out));
    CHECK(one.lse == five.lse);
    CHECK(one.k_cache.same_bytes(five.k_cache));
  }
}

TEST_CASE("large logits neither overflow nor vanish") {
  constexpr int kLength = 150, kHeads = 4, kHeadDim = 64;
  for_dtypes([](DType dtype) {
    const Case input({kHeads, 1, kHeadDim, 1, 200, 0, 0, {kLength}, {}}, dtype);
    for_builds([&](const ParallelFor& parallel) {
      Case c = input;
      AttentionParams p = c.params();
      p.scale = 400.0f;  // logits of several thousands: one key takes all the weight
      attention_cpu(p, parallel);
      for (int h = 0; h < kHeads; ++h) {
        double best = -kInf, second = -kInf;
        int argmax = -1;
        for (int t = 0; t <= kLength; ++t) {  // the call has appended the new token
          double logit = 0.0;
          for (int x = 0; x < kHeadDim; ++x) logit += 400.0 * c.q.get(0, h, 0, x) * c.k_cache.get(0, 0, t, x);
          second = std::max(second, std::min(best, logit));
          if (logit > best) best = logit, argmax = t;
        }
        REQUIRE(best - second > 30.0);
        CHECK(c.lse[h] == doctest::Approx(best).epsilon(1e-5));
        CHECK(c.out.get(0, h, 0, 5) == doctest::Approx(c.v_cache.get(0, 0, argmax, 5)).epsilon(1e-5));
      }
    });
  });
}

TEST_CASE("ZIGZAG_CPU_ISA names a supported set or raises") {
  setenv("ZIGZAG_CPU_ISA", "baseline", 1);
  CHECK(cpu_isa() == CpuIsa::kBaseline);
  setenv("ZIGZAG_CPU_ISA", "sse9", 1);
  CHECK_THROWS_WITH_AS(cpu_isa(), "ZIGZAG_CPU_ISA is 'sse9'; supported: baseline, avx2, avx512", Error);
  if (!cpu_supports(CpuIsa::kAvx512)) {
    setenv("ZIGZAG_CPU_ISA", "avx512", 1);
    CHECK_THROWS_AS(cpu_isa(), Error);
  }
  unsetenv("ZIGZAG_CPU_ISA");
  CHECK(cpu_supports(cpu_isa()));
}

TEST_CASE("thread pool covers every index once and passes an exception on") {
  const ParallelFor pool = make_thread_pool(3);
  for (int64_t count : {0, 1, 2, 3, 100}) {
    std::vector<int> hits(count, 0);
    pool.run(count, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) ++hits[i];
    });
    CHECK(hits == std::vector<int>(count, 1));
  }
  CHECK_THROWS_WITH_AS(pool.run(3, [](int64_t begin, int64_t) { ZZ_CHECK(begin != 2, "index ", begin); }), "index 2", Error);
  CHECK_THROWS_AS(make_thread_pool(0), Error);
}
