#include "cell.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "codes.h"
#include "core/error.h"
#include "kernels/attention.h"
#include "random.h"

namespace zigzag::bench {
namespace {

constexpr float kQuerySigma = 2.5f;  // logits then spread by 2.5, so that the softmax is neither flat nor one-hot
constexpr int kBandwidthBuffers = 2;
constexpr int64_t kBandwidthBytes = 1'000'000'000;
constexpr int64_t kDistinctVectors = 4099;  // a prime: repeated, they meet every place of a tile

Strides contiguous(int heads, int tokens, int head_dim) {
  return {int64_t{heads} * tokens * head_dim, int64_t{tokens} * head_dim, head_dim};
}

}  // namespace

int Cell::slots() const {
  return window > 0 ? sink + window + slack : *std::max_element(kv_lens.begin(), kv_lens.end());
}

int64_t Cell::kv_bytes() const {
  const int64_t keys = std::accumulate(kv_lens.begin(), kv_lens.end(), int64_t{0});
  return 2 * keys * num_kv_heads * (vector_bytes(kv_format, dtype, head_dim) + scale_bytes(kv_format));
}

Strides Cell::strides(int row) const {
  const int64_t all = int64_t{num_kv_heads} * slots() * row;
  if (token_major) return {all, row, int64_t{num_kv_heads} * row};
  return {all, int64_t{slots()} * row, row};
}

Strides Cell::cache_strides() const {
  const bool plain = kv_format == KvFormat::kPlain;
  return strides(plain ? head_dim : static_cast<int>(vector_bytes(kv_format, dtype, head_dim)));
}

Strides Cell::scale_strides() const { return strides(1); }

const char* kv_format(const Cell& cell) {
  if (cell.kv_format != KvFormat::kPlain) return name(cell.kv_format);
  switch (cell.dtype) {
    case DType::kFloat32: return "fp32";
    case DType::kFloat16: return "fp16";
    case DType::kBFloat16: return "bf16";
  }
  return "unknown";
}

Problem::Problem(Device& device, const Cell& cell) {
  const int64_t batch = cell.batch(), rows = batch * cell.num_q_heads * cell.q_len;
  const int64_t query = rows * cell.head_dim, fresh = batch * cell.num_kv_heads * cell.q_len * cell.head_dim;
  const int64_t vectors = batch * cell.num_kv_heads * cell.slots();
  const int64_t cache = vectors * vector_bytes(cell.kv_format, cell.dtype, cell.head_dim);
  const int64_t size = static_cast<int64_t>(element_size(cell.dtype));
  const int64_t sets = std::max<int64_t>(2, (kColdBytes + cell.kv_bytes() - 1) / cell.kv_bytes());
  const auto allocate = [&](int64_t bytes) {
    buffers_.push_back(device.allocate(bytes));
    return static_cast<char*>(buffers_.back().get());
  };
  const auto random = [&](int64_t count, float sigma) {
    char* data = allocate(sets * count * size);
    device.fill_normal(data, sets * count, cell.dtype, sigma, buffers_.size());
    return data;
  };
  char *q = random(query, kQuerySigma), *k_new = random(fresh, 1), *v_new = random(fresh, 1);
  const bool plain = cell.kv_format == KvFormat::kPlain;
  const auto random_cache = [&] {
    return plain ? random(vectors * cell.head_dim, 1) : random_codes(device, cell, sets * vectors);
  };
  char *k_cache = random_cache(), *v_cache = random_cache();
  char* out = allocate(sets * query * size);
  char* lse = allocate(sets * rows * static_cast<int64_t>(sizeof(float)));
  char* seq_lens = allocate(batch * static_cast<int64_t>(sizeof(int32_t)));
  const int64_t table = batch * cell.q_len * cell.head_dim;
  char *cos = nullptr, *sin = nullptr;
  if (cell.rope) cos = random(table, 1), sin = random(table, 1);
  device.upload(seq_lens, cell.seq_lens.data(), batch * static_cast<int64_t>(sizeof(int32_t)));

  AttentionParams p = {};
  p.workspace_bytes = attention_workspace_bytes();
  p.workspace = allocate(p.workspace_bytes);
  p.seq_lens = reinterpret_cast<const int32_t*>(seq_lens);
  p.q_stride = p.out_stride = contiguous(cell.num_q_heads, cell.q_len, cell.head_dim);
  p.k_new_stride = p.v_new_stride = contiguous(cell.num_kv_heads, cell.q_len, cell.head_dim);
  p.k_cache_stride = p.v_cache_stride = cell.cache_strides();
  p.batch = cell.batch(), p.num_q_heads = cell.num_q_heads, p.num_kv_heads = cell.num_kv_heads;
  p.q_len = cell.q_len, p.head_dim = cell.head_dim, p.slots = cell.slots(), p.sink = cell.sink, p.window = cell.window;
  p.scale = 1.0f / std::sqrt(static_cast<float>(cell.head_dim));
  p.dtype = cell.dtype;
  p.k_store.format = p.v_store.format = cell.kv_format;
  p.k_store.scale_stride = p.v_store.scale_stride = cell.scale_strides();
  if (cell.rope) {
    p.rotary.dim = cell.head_dim, p.rotary.dtype = cell.dtype;
    p.rotary.cos_token = p.rotary.sin_token = cell.head_dim;
    p.rotary.cos_batch = p.rotary.sin_batch = int64_t{cell.q_len} * cell.head_dim;
  }
  for (int64_t set = 0; set < sets; ++set) {
    p.q = q + set * query * size, p.out = out + set * query * size;
    p.k_new = k_new + set * fresh * size, p.v_new = v_new + set * fresh * size;
    p.k_cache = k_cache + set * cache, p.v_cache = v_cache + set * cache;
    if (!plain) {
      p.k_store.scale = reinterpret_cast<float*>(k_cache + sets * cache) + set * vectors;
      p.v_store.scale = reinterpret_cast<float*>(v_cache + sets * cache) + set * vectors;
    }
    p.lse = reinterpret_cast<float*>(lse) + set * rows;
    if (cell.rope) p.rotary.cos = cos + set * table * size, p.rotary.sin = sin + set * table * size;
    params_.push_back(p);
  }
}

char* Problem::random_codes(Device& device, const Cell& cell, int64_t vectors) {
  const uint64_t seed = buffers_.size() + 1;
  std::vector<float> x(static_cast<std::size_t>(kDistinctVectors * cell.head_dim));
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = random_normal(seed, i);
  const Codes codes = encode_vectors(x, cell.kv_format, cell.head_dim);
  const int64_t row = vector_bytes(cell.kv_format, cell.dtype, cell.head_dim), size = int64_t{sizeof(float)};
  buffers_.push_back(device.allocate(vectors * (row + size)));
  char* first = static_cast<char*>(buffers_.back().get());
  for (int64_t i = 0; i < vectors; i += kDistinctVectors) {
    const int64_t count = std::min(kDistinctVectors, vectors - i);
    device.upload(first + i * row, codes.bytes.data(), count * row);
    device.upload(first + vectors * row + i * size, codes.scales.data(), count * size);
  }
  return first;
}

Bandwidth measure_bandwidth(Device& device) {
  std::vector<std::shared_ptr<void>> buffers;
  for (int i = 0; i < 2 * kBandwidthBuffers; ++i) {
    buffers.push_back(device.allocate(kBandwidthBytes / kBandwidthBuffers));
    device.fill_normal(buffers.back().get(), kBandwidthBytes / kBandwidthBuffers / 2, DType::kBFloat16, 1,
                       buffers.size());
  }
  const int64_t bytes = kBandwidthBytes / kBandwidthBuffers;
  const auto at = [&](int i) { return buffers[static_cast<std::size_t>(i)].get(); };
  const std::vector<Quantiles> times =
      device.time({{[&](int set) { device.copy(at(2 * set), at(2 * set + 1), bytes); }},
                   {[&](int set) { device.read(at(2 * set), at(2 * set + 1), bytes); }}},
                  kBandwidthBuffers, 2 * bytes);
  const double gigabytes = 2e-9 * static_cast<double>(bytes);
  return {gigabytes / (times[0].p50 * 1e-6), gigabytes / (times[1].p50 * 1e-6)};
}

void run_cell(Device& device, const Cell& cell, const Bandwidth& bandwidth, Table& table) {
  Problem problem(device, cell);
  Check check(device, cell, problem.params(0));
  device.attention(problem.params(0));
  const double error = check.worst_error();
  const auto read = [&](int set) {
    const AttentionParams& params = problem.params(set);
    device.read(params.k_cache, params.v_cache, cell.kv_bytes() / 2);
  };
  const std::vector<Quantiles> times = device.time({{[&](int set) { device.attention(problem.params(set)); }}, {read}},
                                                   problem.num_sets(), cell.kv_bytes());
  const Quantiles ours = times[0], floor = times[1];

  Row row;
  row.op = cell.window > 0 ? "decode_stream" : "decode_full";
  row.impl = "zigzag", row.scenario = cell.scenario;
  row.kv_format = kv_format(cell);
  row.batch = cell.batch(), row.num_q_heads = cell.num_q_heads, row.num_kv_heads = cell.num_kv_heads;
  row.head_dim = cell.head_dim, row.q_len = cell.q_len, row.sink = cell.sink, row.window = cell.window;
  row.kv_len = *std::max_element(cell.kv_lens.begin(), cell.kv_lens.end());
  row.time = ours, row.bytes = cell.kv_bytes(), row.copy_gbps = bandwidth.copy;
  row.percent_read = 100 * floor.p50 / ours.p50, row.error = error;
  table.add(row);
  row.impl = "read", row.time = floor, row.percent_read = 100, row.error = 0;
  table.add(row);
}

}  // namespace zigzag::bench
