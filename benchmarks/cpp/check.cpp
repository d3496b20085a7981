// The slow, obvious attention that every cell is compared with before it is timed.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "cell.h"
#include "codes.h"
#include "core/error.h"
#include "element.h"

namespace zigzag::bench {
namespace {

struct Tolerance {
  double out, lse;
};

// A few roundings of the output's type: the probabilities and the output are rounded to it, the log-sum-exp is float32.
Tolerance tolerance(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return {1e-5, 1e-4};
    case DType::kFloat16: return {2e-3, 1e-3};
    case DType::kBFloat16: return {1e-2, 1e-3};
  }
  return {0, 0};
}

constexpr int64_t kFetchBytes = 64 << 20;  // downloaded at once

// Tokens [0, count) of one row and head, packed: `length` units of `size` bytes each, which strides count too.
std::vector<char> fetch(Device& device, const void* data, const Strides& stride, int row, int head, int count,
                        int64_t size, int64_t length) {
  const int64_t bytes = size * length;
  const char* first = static_cast<const char*>(data) + (row * stride.batch + head * stride.head) * size;
  std::vector<char> packed(static_cast<std::size_t>(count * bytes)), span;
  const int64_t step = std::max<int64_t>(1, kFetchBytes / (stride.token * size));
  for (int64_t begin = 0; begin < count; begin += step) {
    const int64_t tokens = std::min<int64_t>(step, count - begin);
    span.resize(static_cast<std::size_t>((tokens - 1) * stride.token * size + bytes));
    device.download(span.data(), first + begin * stride.token * size, static_cast<int64_t>(span.size()));
    for (int64_t i = 0; i < tokens; ++i) {
      std::memcpy(packed.data() + (begin + i) * bytes, span.data() + i * stride.token * size,
                  static_cast<std::size_t>(bytes));
    }
  }
  return packed;
}

std::vector<char> fetch(Device& device, const void* data, const Strides& stride, int row, int head, int count,
                        const AttentionParams& p) {
  return fetch(device, data, stride, row, head, count, static_cast<int64_t>(element_size(p.dtype)), p.head_dim);
}

Codes fetch_codes(Device& device, const void* data, const Strides& stride, const KvStore& store, int row, int head,
                  int first, int count, const AttentionParams& p) {
  const char* codes = static_cast<const char*>(data) + first * stride.token;
  const float* scales = store.scale + first * store.scale_stride.token;
  Codes fetched;
  fetched.bytes = fetch(device, codes, stride, row, head, count, 1, vector_bytes(store.format, p.dtype, p.head_dim));
  const std::vector<char> bytes = fetch(device, scales, store.scale_stride, row, head, count, sizeof(float), 1);
  fetched.scales.resize(static_cast<std::size_t>(count));
  std::memcpy(fetched.scales.data(), bytes.data(), bytes.size());
  return fetched;
}

std::vector<char> as_bytes(const std::vector<float>& x) {
  const char* bytes = reinterpret_cast<const char*>(x.data());
  return std::vector<char>(bytes, bytes + x.size() * sizeof(float));
}

// What the cache holds before the op, as it is attended.
HeadTokens fetch_cache(Device& device, const void* data, const Strides& stride, const KvStore& store, int row, int head,
                       const AttentionParams& p) {
  if (store.format == KvFormat::kPlain) return {fetch(device, data, stride, row, head, p.slots, p), {}, p.dtype};
  const Codes codes = fetch_codes(device, data, stride, store, row, head, 0, p.slots, p);
  return {as_bytes(decode_vectors(codes, store.format, p.head_dim)), {}, DType::kFloat32};
}

// New tokens as codes.
Codes encode_fresh(const std::vector<char>& fresh, const KvStore& store, const AttentionParams& p) {
  std::vector<float> x(fresh.size() / element_size(p.dtype));
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = load_element(fresh.data(), static_cast<int64_t>(i), p.dtype);
  return encode_vectors(x, store.format, p.head_dim);
}

// Slots first, then the new tokens.
const char* token(const HeadTokens& tokens, const AttentionParams& p, int index) {
  const int64_t bytes = static_cast<int64_t>(element_size(tokens.dtype)) * p.head_dim;
  return index < p.slots ? tokens.cached.data() + index * bytes : tokens.fresh.data() + (index - p.slots) * bytes;
}

// RoPE of the tokens of one head, in place, rounded to the element type.
void rotate(Device& device, const AttentionParams& p, int row, std::vector<char>& tokens) {
  const Rotary& r = p.rotary;
  if (r.dim == 0) return;
  AttentionParams table = p;  // the tables' tokens, for fetch
  table.head_dim = r.dim, table.dtype = r.dtype;
  const std::vector<char> cos = fetch(device, r.cos, {r.cos_batch, 0, r.cos_token}, row, 0, p.q_len, table);
  const std::vector<char> sin = fetch(device, r.sin, {r.sin_batch, 0, r.sin_token}, row, 0, p.q_len, table);
  for (int column = 0; column < p.q_len; ++column) {
    const std::vector<char> before = tokens;
    const int64_t first = int64_t{column} * p.head_dim, angle = int64_t{column} * r.dim;
    for (int d = 0; d < r.dim; ++d) {
      const bool low = d < r.dim / 2;
      const double partner = load_element(before.data(), first + (low ? d + r.dim / 2 : d - r.dim / 2), p.dtype);
      const double x = load_element(before.data(), first + d, p.dtype);
      const double turned = x * double{load_element(cos.data(), angle + d, r.dtype)} +
                            (low ? -partner : partner) * double{load_element(sin.data(), angle + d, r.dtype)};
      store_element(tokens.data(), first + d, p.dtype, static_cast<float>(turned));
    }
  }
}

// Attention of one query over every token whose position it sees. `out` receives head_dim values; returns the
// log-sum-exp.
double attend(const AttentionParams& p, const std::vector<char>& q, const HeadTokens& k, const HeadTokens& v,
              int length, int column, std::vector<double>& out) {
  const RingLayout ring{p.sink, p.window, p.slots};
  std::vector<double> logits(static_cast<std::size_t>(p.slots + p.q_len), -INFINITY);
  double highest = -INFINITY;
  for (int i = 0; i < p.slots + p.q_len; ++i) {
    const int position = i < p.slots ? ring.position(i, length) : length + i - p.slots;
    if (!ring.visible(position, length + column)) continue;
    double dot = 0;
    for (int d = 0; d < p.head_dim; ++d) {
      dot += double{load_element(q.data(), int64_t{column} * p.head_dim + d, p.dtype)} *
             double{load_element(token(k, p, i), d, k.dtype)};
    }
    logits[static_cast<std::size_t>(i)] = dot * double{p.scale};
    highest = std::max(highest, dot * double{p.scale});
  }
  double sum = 0;
  out.assign(static_cast<std::size_t>(p.head_dim), 0.0);
  for (int i = 0; i < p.slots + p.q_len; ++i) {
    const double weight = std::exp(logits[static_cast<std::size_t>(i)] - highest);
    if (weight == 0) continue;
    sum += weight;
    for (int d = 0; d < p.head_dim; ++d)
      out[static_cast<std::size_t>(d)] += weight * double{load_element(token(v, p, i), d, v.dtype)};
  }
  for (double& value : out) value /= sum;
  return highest + std::log(sum);
}

// The new tokens must now be in their slots, bit for bit; rotated keys to one rounding.
void check_append(Device& device, const AttentionParams& p, const void* cache, const HeadTokens& tokens, int row,
                  int head, int length) {
  const RingLayout ring{p.sink, p.window, p.slots};
  for (int i = 0; i < p.q_len; ++i) {
    if (!ring.survives(length + i, length + p.q_len)) continue;
    const int slot = ring.slot(length + i);
    const int64_t element = slot * p.k_cache_stride.token;
    const void* at = static_cast<const char*>(cache) + element * static_cast<int64_t>(element_size(p.dtype));
    const std::vector<char> appended = fetch(device, at, p.k_cache_stride, row, head, 1, p);
    const char* expected = token(tokens, p, p.slots + i);
    bool same = std::memcmp(appended.data(), expected, appended.size()) == 0;
    if (cache == p.k_cache && p.rotary.dim > 0) {
      same = true;
      for (int d = 0; d < p.head_dim; ++d) {
        const double want = load_element(expected, d, p.dtype), got = load_element(appended.data(), d, p.dtype);
        same = same && std::fabs(got - want) <= tolerance(p.dtype).out * std::fabs(want) + 1e-6;
      }
    }
    ZZ_CHECK(same, "row ", row, ", KV head ", head, ": position ", length + i, " was not appended to slot ", slot);
  }
}

// The new tokens must now be in their slots as codes, bit for bit.
void check_codes(Device& device, const AttentionParams& p, const void* cache, const Strides& stride,
                 const KvStore& store, const Codes& fresh, int row, int head, int length) {
  const RingLayout ring{p.sink, p.window, p.slots};
  const std::size_t bytes = fresh.bytes.size() / fresh.scales.size();
  for (int i = 0; i < p.q_len; ++i) {
    if (!ring.survives(length + i, length + p.q_len)) continue;
    const int slot = ring.slot(length + i);
    const Codes appended = fetch_codes(device, cache, stride, store, row, head, slot, 1, p);
    const char* expected = fresh.bytes.data() + static_cast<std::size_t>(i) * bytes;
    ZZ_CHECK(std::memcmp(appended.bytes.data(), expected, bytes) == 0 &&
                 appended.scales[0] == fresh.scales[static_cast<std::size_t>(i)],
             "row ", row, ", KV head ", head, ": the codes of position ", length + i, " were not appended to slot ",
             slot);
  }
}

double check_head(Device& device, const AttentionParams& p, const HeadTokens& k, const HeadTokens& v, int row,
                  int q_head, int length) {
  std::vector<char> q = fetch(device, p.q, p.q_stride, row, q_head, p.q_len, p);
  rotate(device, p, row, q);
  const std::vector<char> out = fetch(device, p.out, p.out_stride, row, q_head, p.q_len, p);
  std::vector<float> lse(static_cast<std::size_t>(p.q_len));
  device.download(lse.data(), p.lse + (int64_t{row} * p.num_q_heads + q_head) * p.q_len,
                  p.q_len * int64_t{sizeof(float)});

  double difference = 0, norm = 0;
  std::vector<double> expected;
  for (int column = 0; column < p.q_len; ++column) {
    const double expected_lse = attend(p, q, k, v, length, column, expected);
    ZZ_CHECK(std::fabs(lse[static_cast<std::size_t>(column)] - expected_lse) <= tolerance(p.dtype).lse, "row ", row,
             ", head ", q_head, ", query ", column, ": log-sum-exp ", lse[static_cast<std::size_t>(column)],
             ", expected ", expected_lse);
    for (int d = 0; d < p.head_dim; ++d) {
      const double want = expected[static_cast<std::size_t>(d)];
      const double delta = double{load_element(out.data(), int64_t{column} * p.head_dim + d, p.dtype)} - want;
      difference += delta * delta, norm += want * want;
    }
  }
  const double error = std::sqrt(difference / norm);
  ZZ_CHECK(error <= tolerance(p.dtype).out, "row ", row, ", head ", q_head, ": relative error ", error, ", allowed ",
           tolerance(p.dtype).out);
  return error;
}

}  // namespace

// First and last row, first and last KV head, every query head of those.
Check::Check(Device& device, const Cell& cell, const AttentionParams& p)
    : device_(device), params_(p), seq_lens_(cell.seq_lens) {
  std::vector<std::pair<int, int>> heads = {{0, 0}, {p.batch - 1, p.num_kv_heads - 1}};
  if (heads[0] == heads[1]) heads.pop_back();
  for (const auto& [row, head] : heads) {
    samples_.push_back({row, head, fetch_cache(device, p.k_cache, p.k_cache_stride, p.k_store, row, head, p),
                        fetch_cache(device, p.v_cache, p.v_cache_stride, p.v_store, row, head, p)});
  }
}

double Check::worst_error() {
  const AttentionParams& p = params_;
  const int group = p.num_q_heads / p.num_kv_heads;
  double worst = 0;
  for (Sample& sample : samples_) {
    const int length = seq_lens_[static_cast<std::size_t>(sample.row)];
    sample.k.fresh = fetch(device_, p.k_new, p.k_new_stride, sample.row, sample.head, p.q_len, p);
    rotate(device_, p, sample.row, sample.k.fresh);
    sample.v.fresh = fetch(device_, p.v_new, p.v_new_stride, sample.row, sample.head, p.q_len, p);
    Codes k_codes, v_codes;
    const bool quantised = p.k_store.format != KvFormat::kPlain;  // both or none, in a benchmark
    if (quantised) {
      k_codes = encode_fresh(sample.k.fresh, p.k_store, p), v_codes = encode_fresh(sample.v.fresh, p.v_store, p);
      sample.k.fresh = as_bytes(decode_vectors(k_codes, p.k_store.format, p.head_dim));
      sample.v.fresh = as_bytes(decode_vectors(v_codes, p.v_store.format, p.head_dim));
    }
    for (int member = 0; member < group; ++member) {
      worst =
          std::max(worst, check_head(device_, p, sample.k, sample.v, sample.row, sample.head * group + member, length));
    }
    if (quantised) {
      check_codes(device_, p, p.k_cache, p.k_cache_stride, p.k_store, k_codes, sample.row, sample.head, length);
      check_codes(device_, p, p.v_cache, p.v_cache_stride, p.v_store, v_codes, sample.row, sample.head, length);
      continue;
    }
    check_append(device_, p, p.k_cache, sample.k, sample.row, sample.head, length);
    check_append(device_, p, p.v_cache, sample.v, sample.row, sample.head, length);
  }
  return worst;
}

}  // namespace zigzag::bench
