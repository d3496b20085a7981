// Every CPU op against a plain double-precision reference, for each dtype, each instruction set that this processor
// runs (forced through ZIGZAG_CPU_ISA) and 1 and 3 threads.
#include <sys/resource.h>
#include <unistd.h>

#include <atomic>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <string>
#include <vector>

#include "core/error.h"
#include "core/thread_pool.h"
#include "cpu/isa.h"
#include "cpu_case.h"
#include "doctest/doctest.h"
#include "kernels/attention.h"

using namespace zigzag;
using namespace zigzag::testing;

namespace {

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
    INFO("heads ", s.num_q_heads, "/", s.num_kv_heads, " head_dim ", s.head_dim, " q_len ", s.q_len, " slots ",
         s.slots);
    INFO("sink ", s.sink, " window ", s.window, " seq_len ", s.seq_lens[0]);
    for_dtypes([&](DType dtype) { check_attention(s, dtype); });
  }
}

}  // namespace

TEST_CASE("decode over a full cache") {
  check_all({
      {4, 1, 64, 1, 8, 0, 0, {0}, {}},                // nothing cached
      {1, 1, 80, 1, 64, 0, 0, {63, 64, 1}, {}},       // last free slot; no free slot; a group of 1
      {6, 2, 96, 1, 130, 0, 0, {127, 128, 129}, {}},  // edges of a tile, a group of 3
      {10, 2, 64, 1, 70, 0, 0, {65, 3}, {}, true},    // a group of 5, strided tensors
      {16, 1, 128, 1, 300, 0, 0, {257, 0}, {}},       // a group of 16
      {8, 8, 256, 2, 70, 0, 0, {66}, {}, true},
      {14, 2, 64, 3, 1100, 0, 0, {1090, 700}, {}},    // several splits, q_len > 1
      {16, 1, 64, 16, 600, 0, 0, {520, 5}, {0, 13}},  // the largest block of rows, padding
      {4, 2, 64, 4, 40, 0, 0, {20, 30}, {4, 2}},      // a row that is nothing but padding
      {4, 2, 64, 4, 10, 0, 0, {8, 10}, {}},           // past the capacity: attended, not appended
      {4, 2, 64, 5, 0, 0, 0, {0, 9}, {}},             // no cache at all
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

TEST_CASE("a ring with slack: nothing outside the window is read") {
  std::vector<Shape> shapes;
  for (int length : {0, 3, 4, 11, 12, 13, 17, 18, 30, 31, 100}) {
    for (int slots : {13, 17, 200}) {
      shapes.push_back({8, 2, 64, 1, slots, 4, 8, {length, length + 5}, {}});
      shapes.push_back({2, 2, 64, 11, slots, 4, 8, {length, length}, {-1, 4}});
      shapes.push_back({2, 1, 64, 40, slots, 4, 8, {length, length}, {0, 44}});
    }
  }
  check_all(shapes);
}

TEST_CASE("prefill") {
  check_all({
      {4, 1, 64, 17, 64, 0, 0, {0}, {}},
      {4, 2, 64, 150, 200, 0, 0, {0, 37}, {}, true},  // continues a cache
      {9, 3, 64, 130, 131, 0, 0, {0, 1}, {70, 130}},  // left padding across blocks; nothing but padding
      {16, 1, 80, 40, 30, 0, 0, {5}, {}},             // past the capacity
      {1, 1, 256, 100, 0, 0, 0, {0}, {}},             // no cache
      {2, 2, 96, 33, 700, 0, 0, {650}, {}},           // keys split among threads
      {4, 2, 64, 100, 12, 4, 8, {0, 3}, {}},          // ring, chunk much longer than the window
      {4, 2, 64, 100, 12, 4, 8, {11, 50}, {7, 95}},
      {6, 2, 128, 90, 84, 20, 64, {200, 10}, {}, true},
      {2, 1, 64, 70, 70, 0, 70, {33}, {}},  // window ends inside the cached part
      {3, 1, 64, 40, 0, 3, 5, {8}, {}},     // ring without a cache
  });
}

TEST_CASE("append writes the same bytes as attention and nothing else") {
  for_dtypes([](DType dtype) {
    for (const Shape& shape :
         {Shape{2, 2, 64, 5, 9, 0, 0, {2, 7}, {1, 0}}, Shape{2, 2, 64, 20, 7, 2, 5, {0, 31}, {}, true},
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
      merge_states_cpu({a.data(), lse_a.data(), b.data(), lse_b.data(), out.data(), lse.data(), kRows, kHeadDim, dtype},
                       parallel);
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
  for (const Shape& shape :
       {Shape{8, 2, 64, 1, 3000, 0, 0, {2999, 1500}, {}}, Shape{4, 2, 64, 300, 400, 0, 0, {50}, {}},
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
  CHECK_THROWS_WITH_AS(pool.run(3, [](int64_t begin, int64_t) { ZZ_CHECK(begin != 2, "index ", begin); }), "index 2",
                       Error);
  CHECK_THROWS_AS(make_thread_pool(0), Error);
}

// A sanitizer's own memory counts too, and it ends the process where it finds none.
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
TEST_CASE("thread pool: a thread that cannot start is an error, and those that did start end") {
  rlimit before{};
  REQUIRE(getrlimit(RLIMIT_AS, &before) == 0);
  int64_t pages = 0;
  std::ifstream("/proc/self/statm") >> pages;
  rlimit less = before;
  less.rlim_cur = static_cast<rlim_t>(pages * sysconf(_SC_PAGESIZE) + (int64_t{64} << 20));  // a stack takes 8 MiB
  REQUIRE(setrlimit(RLIMIT_AS, &less) == 0);
  std::string error = "no error";
  try {
    make_thread_pool(1000);
  } catch (const Error& thrown) {
    error = thrown.what();
  }
  setrlimit(RLIMIT_AS, &before);
  CHECK(error.rfind("a thread pool of 1000 threads could start ", 0) == 0);
  std::atomic<int64_t> sum{0};
  make_thread_pool(4).run(100, [&](int64_t begin, int64_t end) { sum += end - begin; });
  CHECK(sum == 100);
}
#endif
