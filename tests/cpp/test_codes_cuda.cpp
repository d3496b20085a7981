// Decode, prompts in parts, and append over quantised caches on the GPU, against double precision on the CPU. Slots
// that hold nothing are bytes of 0xff with scales that are NaN; codes and scales are compared bit for bit afterwards.
#include <doctest/doctest.h>

#include "kernels/attention.h"

#if ZIGZAG_WITH_CUDA
#include <cmath>
#include <cstring>
#include <random>
#include <string>

#include "core/error.h"
#include "cuda_testing.h"
#include "kv/formats.h"
#include "kv/ring.h"

namespace zigzag {
namespace {

struct CodeCase {
  KvFormat k, v;
  DType dtype;
  int num_kv_heads, group, q_len, head_dim, slots, sink, window;
  std::vector<int32_t> seq_lens, pad;
  double magnitude = 1;  // of the queries, taken out by the factor on the logits
  double apart = 1;      // how much larger every second cached value is; else than at 1, logits are small
  float bad = 0;         // not finite: stands in one element of the first query row and of the last new key
};

std::string describe(const CodeCase& c) {
  std::string text = concat(name(c.k), "/", name(c.v), " ", name(c.dtype), " group ", c.group, " q_len ", c.q_len,
                            " head_dim ", c.head_dim, " slots ", c.slots, " window ", c.window, " lengths");
  for (const int32_t length : c.seq_lens) text += concat(" ", length);
  return text;
}

// Keys or values: new ones in the 16-bit type, cached ones as codes with scales.
struct Side {
  KvFormat format;
  int head_dim, row_bytes;
  std::vector<uint16_t> fresh;  // [batch, heads, q_len, head_dim]
  std::vector<uint8_t> codes;   // [batch, heads, slots, row_bytes]
  std::vector<float> scale;     // [batch, heads, slots]

  void encode(const double* x, size_t at) {
    uint32_t amax = 0;
    for (int d = 0; d < head_dim; ++d) amax = std::max(amax, float_bits(static_cast<float>(x[d])) & 0x7fffffffu);
    dispatch_kv_format(format, [&](auto codec) {
      using Format = decltype(codec);
      const VectorScale s(amax, Format::kMaxCode);
      scale[at] = s.scale;
      std::memset(&codes[at * row_bytes], 0, row_bytes);
      for (int d = 0; d < head_dim; ++d) {
        const uint32_t code = Format::encode(s.scaled(static_cast<float>(x[d])));
        codes[at * row_bytes + d * Format::kBits / 8] |= static_cast<uint8_t>(code << (d * Format::kBits % 8));
      }
    });
  }
  std::vector<double> decode(size_t at) const {
    std::vector<double> x(head_dim);
    dispatch_kv_format(format, [&](auto codec) {
      using Format = decltype(codec);
      for (int d = 0; d < head_dim; ++d) {
        const uint32_t byte = codes[at * row_bytes + d * Format::kBits / 8] >> (d * Format::kBits % 8);
        x[d] = static_cast<double>(Format::decode(byte & ((1u << Format::kBits) - 1))) * scale[at];
      }
    });
    return x;
  }
};

struct Problem {
  explicit Problem(const CodeCase& c) : c(c), batch(static_cast<int>(c.seq_lens.size())) {
    std::mt19937 engine(static_cast<unsigned>(c.q_len * 31 + c.head_dim));
    std::normal_distribution<double> normal;
    const size_t heads = static_cast<size_t>(batch) * c.num_kv_heads;
    for (size_t i = 0; i < heads * c.group * c.q_len * c.head_dim; ++i)
      q.push_back(zigzag::encode((c.apart == 1 ? 2 : 0.1) * c.magnitude * normal(engine), c.dtype));
    if (c.bad != 0) q[3] = zigzag::encode(c.bad, c.dtype);
    for (Side* side : {&k, &v}) {
      side->format = side == &k ? c.k : c.v;
      side->head_dim = c.head_dim, side->row_bytes = static_cast<int>(vector_bytes(side->format, c.dtype, c.head_dim));
      for (size_t i = 0; i < heads * c.q_len * c.head_dim; ++i)
        side->fresh.push_back(zigzag::encode(normal(engine), c.dtype));
      if (c.bad != 0 && side == &k) side->fresh[side->fresh.size() - 5] = zigzag::encode(c.bad, c.dtype);
      side->codes.assign(heads * c.slots * side->row_bytes, 0xff);
      side->scale.assign(heads * c.slots, std::nanf(""));
      std::vector<double> x(c.head_dim);
      for (size_t head = 0; head < heads; ++head) {
        for (int slot = 0; slot < c.slots; ++slot) {
          if (layout().position(slot, c.seq_lens[head / c.num_kv_heads]) < 0) continue;
          const double size = side == &k ? 1 : slot % 2 == 0 ? 1 / std::sqrt(c.apart) : std::sqrt(c.apart);
          for (double& y : x) y = std::exp2(slot % 5) * size * normal(engine);
          side->encode(x.data(), head * c.slots + slot);
        }
      }
    }
  }

  RingLayout layout() const { return {c.sink, c.window, c.slots}; }
  int pad(int b) const { return c.pad.empty() ? 0 : std::clamp(c.pad[b], 0, c.q_len); }
  std::vector<double> fresh(const Side& side, size_t head, int column) const {
    std::vector<double> x(c.head_dim);
    for (int d = 0; d < c.head_dim; ++d)
      x[d] = zigzag::decode(side.fresh[(head * c.q_len + column) * c.head_dim + d], c.dtype);
    return x;
  }

  // out [head_dim] and the log-sum-exp of one query row.
  double attend(int b, int q_head, int column, std::vector<double>& out) const {
    const size_t head = static_cast<size_t>(b) * c.num_kv_heads + q_head / c.group;
    const size_t row = ((static_cast<size_t>(b) * c.num_kv_heads * c.group + q_head) * c.q_len + column) * c.head_dim;
    const int query = c.seq_lens[b] + column - pad(b);
    double high = -INFINITY, sum = 0;
    out.assign(c.head_dim, 0.0);
    const auto add = [&](const std::vector<double>& key, const std::vector<double>& value) {
      double logit = 0;
      for (int d = 0; d < c.head_dim; ++d) logit += zigzag::decode(q[row + d], c.dtype) * key[d];
      logit /= std::sqrt(c.head_dim) * c.magnitude;
      const double top = std::max(high, logit), decay = std::exp(high - top), weight = std::exp(logit - top);
      high = top, sum = sum * decay + weight;
      for (int d = 0; d < c.head_dim; ++d) out[d] = out[d] * decay + weight * value[d];
    };
    for (int slot = 0; slot < c.slots; ++slot) {
      if (!layout().visible(layout().position(slot, c.seq_lens[b]), query)) continue;
      add(k.decode(head * c.slots + slot), v.decode(head * c.slots + slot));
    }
    Side one_k = k, one_v = v;
    for (int t = pad(b); t <= column; ++t) {
      if (!layout().visible(c.seq_lens[b] + t - pad(b), query)) continue;
      one_k.codes.resize(k.row_bytes), one_v.codes.resize(v.row_bytes), one_k.scale.resize(1), one_v.scale.resize(1);
      one_k.encode(fresh(k, head, t).data(), 0), one_v.encode(fresh(v, head, t).data(), 0);
      add(one_k.decode(0), one_v.decode(0));
    }
    for (double& x : out) x /= sum;
    return high + std::log(sum);
  }

  void append() {
    for (int b = 0; b < batch; ++b) {
      const int last = c.seq_lens[b] + c.q_len - pad(b);
      for (int position = c.seq_lens[b]; position < last; ++position) {
        const int slot = layout().slot(position);
        if (slot >= c.slots || !layout().survives(position, last)) continue;
        for (int h = 0; h < c.num_kv_heads; ++h) {
          const size_t head = static_cast<size_t>(b) * c.num_kv_heads + h;
          for (Side* side : {&k, &v}) {
            side->encode(fresh(*side, head, position - c.seq_lens[b] + pad(b)).data(), head * c.slots + slot);
          }
        }
      }
    }
  }

  CodeCase c;
  int batch;
  std::vector<uint16_t> q;
  Side k, v;
};

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

void run(const CodeCase& c, bool attend) {
  INFO(describe(c));
  Problem problem(c);
  const DeviceArray<uint16_t> q(problem.q), k_new(problem.k.fresh), v_new(problem.v.fresh), out(problem.q);
  const DeviceArray<uint8_t> k_codes(problem.k.codes), v_codes(problem.v.codes);
  const DeviceArray<float> k_scale(problem.k.scale), v_scale(problem.v.scale);
  const int q_heads = c.num_kv_heads * c.group;
  const DeviceArray<float> lse(
      std::vector<float>(static_cast<size_t>(problem.batch) * q_heads * c.q_len, std::nanf("")));
  const DeviceArray<int32_t> lens(c.seq_lens), pad(c.pad);
  const int64_t bytes = attention_workspace_bytes();
  const DeviceArray<char> workspace(std::vector<char>(static_cast<size_t>(bytes), 0));

  const auto strides = [](int heads, int tokens, int row) {
    return Strides{static_cast<int64_t>(heads) * tokens * row, static_cast<int64_t>(tokens) * row, row};
  };
  const auto fill = [&](auto& p) {
    p.k_new = k_new.data(), p.v_new = v_new.data(), p.k_cache = k_codes.data(), p.v_cache = v_codes.data();
    p.seq_lens = lens.data(), p.pad = c.pad.empty() ? nullptr : pad.data();
    p.k_new_stride = p.v_new_stride = strides(c.num_kv_heads, c.q_len, c.head_dim);
    p.k_cache_stride = strides(c.num_kv_heads, c.slots, problem.k.row_bytes);
    p.v_cache_stride = strides(c.num_kv_heads, c.slots, problem.v.row_bytes);
    p.k_store = {c.k, k_scale.data(), strides(c.num_kv_heads, c.slots, 1)};
    p.v_store = {c.v, v_scale.data(), strides(c.num_kv_heads, c.slots, 1)};
    p.batch = problem.batch, p.num_kv_heads = c.num_kv_heads, p.q_len = c.q_len, p.head_dim = c.head_dim;
    p.slots = c.slots, p.sink = c.sink, p.window = c.window, p.dtype = c.dtype;
  };
  if (attend) {
    AttentionParams p = {};
    fill(p);
    p.q = q.data(), p.out = out.data(), p.lse = lse.data(), p.workspace = workspace.data(), p.workspace_bytes = bytes;
    p.q_stride = p.out_stride = strides(q_heads, c.q_len, c.head_dim);
    p.num_q_heads = q_heads, p.scale = static_cast<float>(1 / (std::sqrt(c.head_dim) * c.magnitude));
    attention_cuda(p, nullptr);
  } else {
    AppendParams p = {};
    fill(p);
    append_cuda(p, nullptr);
  }
  CHECK_CUDA(cudaDeviceSynchronize());

  if (attend) {
    const std::vector<uint16_t> got = out.host();
    const std::vector<float> got_lse = lse.host();
    std::vector<double> expected;
    double worst = 0;
    for (size_t row = 0; row < got_lse.size(); ++row) {
      const int b = static_cast<int>(row / (q_heads * c.q_len)), column = static_cast<int>(row % c.q_len);
      double error = 0, norm = 0;
      if (column < problem.pad(b)) {
        for (int d = 0; d < c.head_dim; ++d) CHECK(zigzag::decode(got[row * c.head_dim + d], c.dtype) == 0);
        CHECK(got_lse[row] == -INFINITY);
        continue;
      }
      const int head = static_cast<int>(row / c.q_len % q_heads);
      if (c.bad != 0 && (row == 0 || (b == problem.batch - 1 && head >= q_heads - c.group && column == c.q_len - 1))) {
        for (int d = 0; d < c.head_dim; ++d) CHECK(std::isnan(zigzag::decode(got[row * c.head_dim + d], c.dtype)));
        CHECK(std::isnan(got_lse[row]));
        continue;
      }
      const double log_sum = problem.attend(b, head, column, expected);
      for (int d = 0; d < c.head_dim; ++d) {
        const double difference = zigzag::decode(got[row * c.head_dim + d], c.dtype) - expected[d];
        error += difference * difference, norm += expected[d] * expected[d];
      }
      worst = std::max(worst, std::isnan(error) ? INFINITY : std::sqrt(error / norm));
      CHECK(std::abs(got_lse[row] - log_sum) <= 2e-3);
    }
    CHECK(worst <= (c.dtype == DType::kBFloat16 ? 8e-3 : 1e-3));
  }
  problem.append();
  CHECK(same_bits(k_codes.host(), problem.k.codes));
  CHECK(same_bits(v_codes.host(), problem.v.codes));
  CHECK(same_bits(k_scale.host(), problem.k.scale));
  CHECK(same_bits(v_scale.host(), problem.v.scale));
}

constexpr KvFormat kFp8 = KvFormat::kFp8, kInt8 = KvFormat::kInt8, kInt4 = KvFormat::kInt4;
constexpr KvFormat kPairs[][2] = {{kFp8, kFp8}, {kInt8, kInt8}, {kInt4, kInt4}, {kInt8, kInt4}};
constexpr DType kBoth[] = {DType::kBFloat16, DType::kFloat16};

}  // namespace

TEST_CASE("decode over quantised full caches") {
  if (no_device()) return;
  for (const auto& pair : kPairs) {
    for (const DType dtype : kBoth) {
      run({pair[0], pair[1], dtype, 2, 4, 1, 128, 70, 0, 0, {0, 1, 15, 16, 17, 69}, {}}, true);
      run({pair[0], pair[1], dtype, 1, 4, 5, 64, 40, 0, 0, {0, 33}, {2, 0}}, true);
      run({pair[0], pair[1], dtype, 2, 3, 9, 128, 37, 0, 0, {30, 36, 37, 10}, {0, 3, 0, 9}}, true);  // too few slots
    }
  }
}

TEST_CASE("decode over quantised rings") {
  if (no_device()) return;
  for (const auto& pair : kPairs) {
    if (pair[0] != pair[1]) continue;
    for (const DType dtype : kBoth) {
      run({pair[0], pair[1], dtype, 2, 4, 1, 128, 36, 4, 32, {0, 3, 4, 35, 36, 37, 90}, {}}, true);
      run({pair[0], pair[1], dtype, 1, 3, 6, 64, 21, 5, 16, {0, 4, 50, 0}, {0, 1, 0, 6}}, true);
    }
  }
}

TEST_CASE("decode over quantised rings with slack, and windows over buffers for every token") {
  if (no_device()) return;
  for (const auto& pair : kPairs) {
    if (pair[0] != pair[1]) continue;
    for (const DType dtype : kBoth) {
      run({pair[0], pair[1], dtype, 2, 4, 1, 128, 41, 4, 32, {0, 3, 4, 35, 36, 37, 40, 41, 42, 90}, {}}, true);
      run({pair[0], pair[1], dtype, 1, 3, 6, 64, 41, 5, 16, {0, 4, 50, 0, 41, 36}, {0, 1, 0, 6, 0, -2}}, true);
      run({pair[0], pair[1], dtype, 2, 4, 1, 64, 500, 20, 100, {0, 119, 120, 130, 480, 530, 900}, {}}, true);
      run({pair[0], pair[1], dtype, 1, 2, 50, 64, 29, 4, 16, {0, 40, 7}, {3, 0, 50}}, true);  // in parts
      run({pair[0], pair[1], dtype, 1, 2, 50, 64, 300, 4, 16, {0, 40, 7}, {3, 0, 60}}, true);
      run({pair[0], pair[1], dtype, 2, 1, 30, 64, 15, 2, 10, {0, 31, 5}, {}}, false);
    }
  }
}

TEST_CASE("quantised decode for both head dims and for two row tiles") {
  if (no_device()) return;
  for (const int head_dim : {64, 128}) {
    for (const auto& pair : kPairs) {
      run({pair[0], pair[1], DType::kBFloat16, 1, 16, 1, head_dim, 50, 0, 0, {40}, {}}, true);
      if (pair[0] == pair[1]) run({pair[0], pair[1], DType::kFloat16, 1, 2, 1, head_dim, 24, 4, 20, {60}, {}}, true);
    }
  }
}

TEST_CASE("quantised caches long enough for several blocks and stages") {
  if (no_device()) return;
  for (const auto& pair : kPairs) {
    run({pair[0], pair[1], DType::kBFloat16, 1, 4, 1, 128, 3000, 0, 0, {2999, 100}, {}}, true);
    run({pair[0], pair[1], DType::kFloat16, 1, 12, 2, 128, 3000, 0, 0, {2900}, {}}, true);  // row tiles, row blocks
    run({pair[0], pair[1], DType::kBFloat16, 2, 1, 16, 64, 3000, 0, 0, {2985}, {}}, true);  // new tokens in two tiles
    run({pair[0], pair[1], DType::kBFloat16, 1, 8, 1, 128, 20000, 0, 0, {19999}, {}},
        true);  // several clusters per head
    run({pair[0], pair[1], DType::kFloat16, 2, 4, 5, 64, 9000, 0, 0, {8990}, {}}, true);
    if (pair[0] == pair[1]) run({pair[0], pair[1], DType::kBFloat16, 1, 4, 2, 64, 1064, 64, 1000, {5000}, {}}, true);
  }
}

TEST_CASE("prompts over quantised caches in parts") {
  if (no_device()) return;
  for (const auto& pair : kPairs) {
    run({pair[0], pair[1], DType::kBFloat16, 1, 2, 50, 64, 90, 0, 0, {0, 40, 7}, {0, 0, 20}}, true);
    if (pair[0] == pair[1])
      run({pair[0], pair[1], DType::kBFloat16, 1, 2, 50, 64, 20, 4, 16, {0, 40, 7}, {3, 0, 50}}, true);
  }
}

TEST_CASE("queries of every magnitude") {
  if (no_device()) return;
  for (const auto& pair : kPairs) {
    for (const double magnitude : {0x1p-110, 0x1p-20, 0x1p20, 0x1p90}) {
      run({pair[0], pair[1], DType::kBFloat16, 1, 4, 2, 128, 70, 0, 0, {60}, {}, magnitude}, true);
    }
  }
}

TEST_CASE("values far apart") {
  if (no_device()) return;
  for (const auto& pair : kPairs) {
    for (const double apart : {0x1p-20, 0x1p60, 0x1p128}) {
      run({pair[0], pair[1], DType::kBFloat16, 1, 4, 2, 128, 70, 0, 0, {60}, {}, 1, apart}, true);
      run({pair[0], pair[1], DType::kBFloat16, 1, 4, 1, 64, 1000, 0, 0, {999}, {}, 1, apart}, true);
      if (pair[0] == pair[1])
        run({pair[0], pair[1], DType::kBFloat16, 1, 4, 1, 64, 20, 4, 16, {60}, {}, 1, apart}, true);
    }
  }
}

TEST_CASE("what is not finite stays visible, where it is attended only") {
  if (no_device()) return;
  for (const auto& pair : kPairs) {
    for (const float bad : {INFINITY, -INFINITY, NAN}) {
      run({pair[0], pair[1], DType::kBFloat16, 2, 4, 2, 128, 70, 0, 0, {0, 60}, {}, 1, 1, bad}, true);
      if (pair[0] != pair[1]) continue;
      run({pair[0], pair[1], DType::kFloat16, 2, 4, 2, 64, 20, 4, 16, {0, 60}, {}, 1, 1, bad}, true);
    }
  }
}

TEST_CASE("append to quantised caches") {
  if (no_device()) return;
  for (const auto& pair : kPairs) {
    for (const int head_dim : {64, 96, 256}) {
      run({pair[0], pair[1], DType::kBFloat16, 2, 1, 30, head_dim, 60, 0, 0, {0, 31, 29}, {0, 4, 30}}, false);
      run({pair[0], pair[1], DType::kFloat16, 2, 1, 30, head_dim, 12, 2, 10, {0, 31, 5}, {}}, false);
    }
  }
}

TEST_CASE("what quantised CUDA kernels do not serve raises") {
  if (no_device()) return;
  AttentionParams p = {};
  p.batch = p.num_q_heads = p.num_kv_heads = p.q_len = 1, p.head_dim = 64, p.dtype = DType::kBFloat16;
  p.k_store.format = kInt4, p.v_store.format = kFp8;
  CHECK_THROWS_WITH_AS(attention_cuda(p, nullptr), doctest::Contains("supported: fp8, int8 and int4 for both"), Error);
  p.k_store.format = kInt8, p.v_store.format = kInt4, p.window = 4;
  CHECK_THROWS_WITH_AS(attention_cuda(p, nullptr), doctest::Contains("in a ring are not supported"), Error);
  p.k_store.format = kInt4, p.window = 0, p.head_dim = 80;
  CHECK_THROWS_WITH_AS(attention_cuda(p, nullptr), doctest::Contains("supported: 64, 128"), Error);
  p.head_dim = 64, p.q_len = 17;
  CHECK_THROWS_WITH_AS(attention_cuda(p, nullptr), doctest::Contains("need a cache with slots"), Error);
}

}  // namespace zigzag
#endif
