#include "cell.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "core/error.h"
#include "kernels/attention.h"

namespace zigzag::bench {
namespace {

constexpr float kQuerySigma = 2.5f;  // logits then spread by 2.5, so that the softmax is neither flat nor one-hot
constexpr int kBandwidthBuffers = 2;
constexpr int64_t kBandwidthBytes = 1'000'000'000;

Strides contiguous(int heads, int tokens, int head_dim) {
  return {int64_t{heads} * tokens * head_dim, int64_t{tokens} * head_dim, head_dim};
}

}  // namespace

int Cell::slots() const { return window > 0 ? sink + window : *std::max_element(kv_lens.begin(), kv_lens.end()); }

int64_t Cell::kv_bytes() const {
  const int64_t keys = std::accumulate(kv_lens.begin(), kv_lens.end(), int64_t{0});
  return 2 * keys * num_kv_heads * head_dim * static_cast<int64_t>(element_size(dtype));
}

Strides Cell::cache_strides() const {
  const int64_t row = int64_t{num_kv_heads} * slots() * head_dim;
  if (token_major) return {row, head_dim, int64_t{num_kv_heads} * head_dim};
  return {row, int64_t{slots()} * head_dim, head_dim};
}

const char* kv_format(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return "fp32";
    case DType::kFloat16: return "fp16";
    case DType::kBFloat16: return "bf16";
  }
  return "unknown";
}

Problem::Problem(Device& device, const Cell& cell) {
  const int64_t batch = cell.batch(), rows = batch * cell.num_q_heads * cell.q_len;
  const int64_t query = rows * cell.head_dim, fresh = batch * cell.num_kv_heads * cell.q_len * cell.head_dim;
  const int64_t cache = batch * cell.num_kv_heads * cell.slots() * cell.head_dim;
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
  char *k_cache = random(cache, 1), *v_cache = random(cache, 1);
  char* out = allocate(sets * query * size);
  char* lse = allocate(sets * rows * static_cast<int64_t>(sizeof(float)));
  char* seq_lens = allocate(batch * static_cast<int64_t>(sizeof(int32_t)));
  const int64_t table = batch * cell.q_len * cell.head_dim;
  char *cos = nullptr, *sin = nullptr;
  if (cell.rope) cos = random(table, 1), sin = random(table, 1);
  device.upload(seq_lens, cell.seq_lens.data(), batch * static_cast<int64_t>(sizeof(int32_t)));

  AttentionParams p = {};
  p.workspace_bytes = attention_workspace_bytes(cell.batch(), cell.num_q_heads, cell.num_kv_heads, cell.head_dim);
  p.workspace = allocate(p.workspace_bytes);
  p.seq_lens = reinterpret_cast<const int32_t*>(seq_lens);
  p.q_stride = p.out_stride = contiguous(cell.num_q_heads, cell.q_len, cell.head_dim);
  p.k_new_stride = p.v_new_stride = contiguous(cell.num_kv_heads, cell.q_len, cell.head_dim);
  p.k_cache_stride = p.v_cache_stride = cell.cache_strides();
  p.batch = cell.batch(), p.num_q_heads = cell.num_q_heads, p.num_kv_heads = cell.num_kv_heads;
  p.q_len = cell.q_len, p.head_dim = cell.head_dim, p.slots = cell.slots(), p.sink = cell.sink, p.window = cell.window;
  p.scale = 1.0f / std::sqrt(static_cast<float>(cell.head_dim));
  p.dtype = cell.dtype;
  if (cell.rope) {
    p.rotary.dim = cell.head_dim, p.rotary.dtype = cell.dtype;
    p.rotary.cos_token = p.rotary.sin_token = cell.head_dim;
    p.rotary.cos_batch = p.rotary.sin_batch = int64_t{cell.q_len} * cell.head_dim;
  }
  for (int64_t set = 0; set < sets; ++set) {
    p.q = q + set * query * size, p.out = out + set * query * size;
    p.k_new = k_new + set * fresh * size, p.v_new = v_new + set * fresh * size;
    p.k_cache = k_cache + set * cache * size, p.v_cache = v_cache + set * cache * size;
    p.lse = reinterpret_cast<float*>(lse) + set * rows;
    if (cell.rope) p.rotary.cos = cos + set * table * size, p.rotary.sin = sin + set * table * size;
    params_.push_back(p);
  }
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
  const std::vector<Quantiles> times = device.time({[&](int set) { device.copy(at(2 * set), at(2 * set + 1), bytes); },
                                                    [&](int set) { device.read(at(2 * set), at(2 * set + 1), bytes); }},
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
  const std::vector<Quantiles> times =
      device.time({[&](int set) { device.attention(problem.params(set)); }, read}, problem.num_sets(), cell.kv_bytes());
  const Quantiles ours = times[0], floor = times[1];

  Row row;
  row.op = cell.window > 0 ? "decode_stream" : "decode_full";
  row.impl = "zigzag", row.scenario = cell.scenario;
  row.kv_format = kv_format(cell.dtype);
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
