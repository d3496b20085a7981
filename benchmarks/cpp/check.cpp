// The slow, obvious attention that every cell is compared with before it is timed.
#include <cmath>
#include <cstring>

#include "cell.h"
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

std::vector<char> fetch(Device& device, const void* data, int64_t offset, int64_t count, DType dtype) {
  const int64_t size = static_cast<int64_t>(element_size(dtype));
  std::vector<char> host(static_cast<std::size_t>(count * size));
  device.download(host.data(), static_cast<const char*>(data) + offset * size, count * size);
  return host;
}

// RoPE of the tokens of one head, in place, rounded to the element type.
void rotate(Device& device, const AttentionParams& p, int row, std::vector<char>& tokens) {
  const Rotary& r = p.rotary;
  if (r.dim == 0) return;
  for (int column = 0; column < p.q_len; ++column) {
    const std::vector<char> cos = fetch(device, r.cos, row * r.cos_batch + column * r.cos_token, r.dim, r.dtype);
    const std::vector<char> sin = fetch(device, r.sin, row * r.sin_batch + column * r.sin_token, r.dim, r.dtype);
    const std::vector<char> before = tokens;
    const int64_t first = int64_t{column} * p.head_dim;
    for (int d = 0; d < r.dim; ++d) {
      const bool low = d < r.dim / 2;
      const double partner = load_element(before.data(), first + (low ? d + r.dim / 2 : d - r.dim / 2), p.dtype);
      const double x = load_element(before.data(), first + d, p.dtype);
      const double turned = x * double{load_element(cos.data(), d, r.dtype)} +
                            (low ? -partner : partner) * double{load_element(sin.data(), d, r.dtype)};
      store_element(tokens.data(), first + d, p.dtype, static_cast<float>(turned));
    }
  }
}

// Keys or values of one KV head: the cache before the call, then the new tokens.
struct HeadTokens {
  std::vector<char> cached, fresh;

  HeadTokens(Device& device, const AttentionParams& p, const void* cache, const void* fresh_tokens, int row, int head,
             bool rotated)
      : cached(fetch(device, cache, row * p.k_cache_stride.batch + head * p.k_cache_stride.head,
                     int64_t{p.slots} * p.head_dim, p.dtype)),
        fresh(fetch(device, fresh_tokens, row * p.k_new_stride.batch + head * p.k_new_stride.head,
                    int64_t{p.q_len} * p.head_dim, p.dtype)) {
    if (rotated) rotate(device, p, row, fresh);
  }

  const char* token(const AttentionParams& p, int index) const {
    const int64_t bytes = static_cast<int64_t>(element_size(p.dtype)) * p.head_dim;
    return index < p.slots ? cached.data() + index * bytes : fresh.data() + (index - p.slots) * bytes;
  }
};

// Attention of one query over every token whose position it sees. `out` receives head_dim values; returns the
// log-sum-exp.
double attend(const AttentionParams& p, const std::vector<char>& q, const HeadTokens& k, const HeadTokens& v,
              int length, int column, std::vector<double>& out) {
  const RingLayout ring{p.sink, p.window};
  std::vector<double> logits(static_cast<std::size_t>(p.slots + p.q_len), -INFINITY);
  double highest = -INFINITY;
  for (int i = 0; i < p.slots + p.q_len; ++i) {
    const int position = i < p.slots ? ring.position(i, length) : length + i - p.slots;
    if (!ring.visible(position, length + column)) continue;
    double dot = 0;
    for (int d = 0; d < p.head_dim; ++d) {
      dot += double{load_element(q.data(), int64_t{column} * p.head_dim + d, p.dtype)} *
             double{load_element(k.token(p, i), d, p.dtype)};
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
      out[static_cast<std::size_t>(d)] += weight * double{load_element(v.token(p, i), d, p.dtype)};
  }
  for (double& value : out) value /= sum;
  return highest + std::log(sum);
}

// The new tokens must now be in their slots, bit for bit; rotated keys to one rounding.
void check_append(Device& device, const AttentionParams& p, const void* cache, const HeadTokens& before, int row,
                  int head, int length) {
  const RingLayout ring{p.sink, p.window};
  for (int i = 0; i < p.q_len; ++i) {
    if (!ring.survives(length + i, length + p.q_len)) continue;
    const int slot = ring.slot(length + i);
    const int64_t offset = row * p.k_cache_stride.batch + head * p.k_cache_stride.head + slot * p.k_cache_stride.token;
    const std::vector<char> appended = fetch(device, cache, offset, p.head_dim, p.dtype);
    const char* expected = before.token(p, p.slots + i);
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

double check_head(Device& device, const AttentionParams& p, const HeadTokens& k, const HeadTokens& v, int row,
                  int q_head, int length) {
  const int64_t elements = int64_t{p.q_len} * p.head_dim;
  std::vector<char> q = fetch(device, p.q, row * p.q_stride.batch + q_head * p.q_stride.head, elements, p.dtype);
  rotate(device, p, row, q);
  const std::vector<char> out =
      fetch(device, p.out, row * p.out_stride.batch + q_head * p.out_stride.head, elements, p.dtype);
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

double check(Device& device, const Cell& cell, const AttentionParams& p) {
  // First and last row, first and last KV head, every query head of those.
  const int group = p.num_q_heads / p.num_kv_heads;
  std::vector<std::pair<int, int>> samples = {{0, 0}, {p.batch - 1, p.num_kv_heads - 1}};
  if (samples[0] == samples[1]) samples.pop_back();
  std::vector<HeadTokens> keys, values;
  for (const auto& [row, head] : samples) {
    keys.emplace_back(device, p, p.k_cache, p.k_new, row, head, true);
    values.emplace_back(device, p, p.v_cache, p.v_new, row, head, false);
  }
  device.attention(p);
  double worst = 0;
  for (std::size_t i = 0; i < samples.size(); ++i) {
    const auto [row, head] = samples[i];
    const int length = cell.seq_lens[static_cast<std::size_t>(row)];
    for (int member = 0; member < group; ++member) {
      worst = std::max(worst, check_head(device, p, keys[i], values[i], row, head * group + member, length));
    }
    check_append(device, p, p.k_cache, keys[i], row, head, length);
    check_append(device, p, p.v_cache, values[i], row, head, length);
  }
  return worst;
}

}  // namespace zigzag::bench
