#include "layers.h"

#include <algorithm>
#include <cmath>

#include "core/error.h"

namespace zigzag::bench {
namespace {

int64_t size_of(const Cell& cell) { return static_cast<int64_t>(element_size(cell.dtype)); }

int64_t qkv_width(const Cell& cell) { return int64_t{cell.num_q_heads + 2 * cell.num_kv_heads} * cell.head_dim; }

int64_t out_width(const Cell& cell) { return int64_t{cell.num_q_heads} * cell.head_dim; }

int64_t num_tokens(const Cell& cell) { return int64_t{cell.batch()} * cell.q_len; }

int64_t cache_bytes(const Cell& cell) { return cell.batch() * cell.cache_strides().batch * size_of(cell); }

Scheduler make_scheduler(const Chain& chain) {
  const Cell& cell = chain.cell(0);
  const std::vector<HeadKinds> layers(chain.kinds.begin(), chain.kinds.end());
  return Scheduler(LayerPlan(layers, chain.streaming.sink, chain.streaming.window),
                   {cell.num_q_heads, cell.num_kv_heads, cell.head_dim, cell.dtype});
}

}  // namespace

int64_t Chain::kv_bytes() const {
  int64_t bytes = 0;
  for (int layer = 0; layer < num_layers(); ++layer) bytes += cell(layer).kv_bytes();
  return bytes;
}

int64_t Chain::weight_bytes() const {
  return num_layers() * hidden * (qkv_width(retrieval) + out_width(retrieval)) * size_of(retrieval);
}

ChainProblem::ChainProblem(Device& device, const Chain& chain)
    : device_(device),
      chain_(chain),
      scheduler_(make_scheduler(chain)),
      num_sets_(static_cast<int>((kColdBytes + chain.kv_bytes() - 1) / chain.kv_bytes())),
      final_(nullptr) {
  for (int layer = 0; layer < chain.num_layers(); ++layer) allocate_layer(chain.cell(layer), layer == 0);
  const Cell& cell = chain.cell(0);
  if (chain.hidden > 0) final_ = allocate(num_tokens(cell) * chain.hidden * size_of(cell));
  const int64_t lengths = cell.batch() * static_cast<int64_t>(sizeof(int32_t));
  char* seq_lens = allocate(lengths);
  step_ = {cell.batch(), cell.q_len, reinterpret_cast<int32_t*>(seq_lens)};
  step_.workspace_bytes = attention_workspace_bytes();
  step_.workspace = allocate(step_.workspace_bytes);
  const int64_t qkv = qkv_width(cell), out = out_width(cell);
  shared_.q_stride = shared_.k_new_stride = shared_.v_new_stride = {qkv * cell.q_len, cell.head_dim, qkv};
  shared_.out_stride = {out * cell.q_len, cell.head_dim, out};
  if (cell.rope) {  // one table for all layers, as in a model
    const int64_t table = num_tokens(cell) * cell.head_dim, row = int64_t{cell.q_len} * cell.head_dim;
    const void *cos = random(table, 1), *sin = random(table, 1);
    shared_.rotary = {cos, sin, row, cell.head_dim, row, cell.head_dim, cell.head_dim, cell.dtype};
  }
  shared_.scale = 1.0f / std::sqrt(static_cast<float>(cell.head_dim));
  set_lengths();
  if (chain.hidden > 0) projections(0);  // a capture must not be the first to look for cuBLAS
  for (int set = 0; set < num_sets_; ++set) prepare_step(set);
}

char* ChainProblem::allocate(int64_t bytes) {
  buffers_.push_back(device_.allocate(bytes));
  return static_cast<char*>(buffers_.back().get());
}

char* ChainProblem::random(int64_t count, float sigma) {
  char* data = allocate(count * size_of(chain_.cell(0)));
  device_.fill_normal(data, count, chain_.cell(0).dtype, sigma, buffers_.size());
  return data;
}

void ChainProblem::allocate_layer(const Cell& cell, bool first) {
  const int64_t cache = num_sets_ * cache_bytes(cell) / size_of(cell), tokens = num_tokens(cell);
  Layer layer = {};
  layer.k_cache = random(cache, 1), layer.v_cache = random(cache, 1);
  layer.qkv = random(tokens * qkv_width(cell), 1);
  layer.out = random(tokens * out_width(cell), 1);
  layer.lse = reinterpret_cast<float*>(allocate(tokens * cell.num_q_heads * static_cast<int64_t>(sizeof(float))));
  if (chain_.hidden > 0) {
    const int64_t hidden = chain_.hidden;  // the sigmas keep the variance of what goes in
    layer.qkv_weight = random(hidden * qkv_width(cell), 1 / std::sqrt(static_cast<float>(hidden)));
    layer.out_weight = random(hidden * out_width(cell), 1 / std::sqrt(static_cast<float>(out_width(cell))));
    layer.input = first ? random(tokens * hidden, 1) : allocate(tokens * hidden * size_of(cell));
  }
  layers_.push_back(layer);
}

LayerTensors ChainProblem::tensors(int set, int index) const {
  const Cell& cell = chain_.cell(index);
  const Layer& layer = layers_[static_cast<std::size_t>(index)];
  const int64_t head = cell.head_dim * size_of(cell);
  LayerTensors p = shared_;
  p.q = layer.qkv;
  p.k_new = layer.qkv + cell.num_q_heads * head;
  p.v_new = layer.qkv + (cell.num_q_heads + cell.num_kv_heads) * head;
  if (chain_.hidden == 0 && index > 0) {
    p.q = layers_[static_cast<std::size_t>(index) - 1].out;
    p.q_stride = p.out_stride;
  }
  p.out = layer.out, p.lse = layer.lse;
  CacheTensors& cache = p.caches[0];
  cache.k = layer.k_cache + set * cache_bytes(cell);
  cache.v = layer.v_cache + set * cache_bytes(cell);
  cache.k_stride = cache.v_stride = cell.cache_strides();
  cache.capacity = cell.slots();
  return p;
}

AttentionParams ChainProblem::params(int set, int layer) const {
  return scheduler_.params(layer, 0, step_, tensors(set, layer));
}

void ChainProblem::project_in(int index) {
  const Cell& cell = chain_.cell(index);
  const Layer& layer = layers_[static_cast<std::size_t>(index)];
  device_.linear({layer.qkv_weight, layer.input, layer.qkv, static_cast<int>(num_tokens(cell)), chain_.hidden,
                  static_cast<int>(qkv_width(cell)), cell.dtype});
}

void ChainProblem::project_out(int index) {
  const Cell& cell = chain_.cell(index);
  const Layer& layer = layers_[static_cast<std::size_t>(index)];
  const bool last = index + 1 == chain_.num_layers();
  device_.linear({layer.out_weight, layer.out, last ? final_ : layers_[static_cast<std::size_t>(index) + 1].input,
                  static_cast<int>(num_tokens(cell)), static_cast<int>(out_width(cell)), chain_.hidden, cell.dtype});
}

void ChainProblem::prepare_step(int set) {
  const auto layer_call = [this, set](int layer) {
    if (chain_.hidden > 0) {
      if (layer > 0) project_out(layer - 1);
      project_in(layer);
    }
    return tensors(set, layer);
  };
  std::function<void()> after;
  if (chain_.hidden > 0) after = [this] { project_out(chain_.num_layers() - 1); };
  steps_.push_back(device_.prepare(scheduler_, step_, layer_call, after, chain_.cell(0).seq_lens[0]));
}

void ChainProblem::set_lengths() {
  const std::vector<int32_t>& lengths = chain_.cell(0).seq_lens;
  device_.upload(step_.seq_lens, lengths.data(), static_cast<int64_t>(lengths.size() * sizeof(int32_t)));
}

void ChainProblem::projections(int) {
  for (int layer = 0; layer < chain_.num_layers(); ++layer) {
    project_in(layer);
    project_out(layer);
  }
}

void ChainProblem::read(int set) {
  for (int layer = 0; layer < chain_.num_layers(); ++layer) {
    const CacheTensors cache = tensors(set, layer).caches[0];
    device_.read(cache.k, cache.v, chain_.cell(layer).kv_bytes() / 2);
  }
}

namespace {

// One whole step, then the first and the last layer of each kind: their queries are what the layers before them put
// out, so a wrong order or a missing dependency shows.
double check_chain(Device& device, const Chain& chain, ChainProblem& problem) {
  std::vector<int> checked;
  for (const LayerKind kind : {LayerKind::kRetrieval, LayerKind::kStreaming}) {
    const auto first = std::find(chain.kinds.begin(), chain.kinds.end(), kind);
    if (first == chain.kinds.end()) continue;
    const auto last = std::find(chain.kinds.rbegin(), chain.kinds.rend(), kind);
    checked.push_back(static_cast<int>(first - chain.kinds.begin()));
    checked.push_back(static_cast<int>(chain.kinds.rend() - last) - 1);
  }
  std::vector<Check> checks;
  for (const int layer : checked) checks.emplace_back(device, chain.cell(layer), problem.params(0, layer));
  problem.step(0);
  double worst = 0;
  for (Check& check : checks) worst = std::max(worst, check.worst_error());
  return worst;
}

Row row_of(const Chain& chain, const Bandwidth& bandwidth) {
  const Cell& cell = chain.cell(0);
  Row row = {};
  row.scenario = chain.scenario, row.kv_format = kv_format(cell);
  row.batch = cell.batch(), row.num_q_heads = cell.num_q_heads, row.num_kv_heads = cell.num_kv_heads;
  row.head_dim = cell.head_dim, row.q_len = cell.q_len, row.kv_len = cell.seq_lens[0] + cell.q_len;
  row.sink = chain.streaming.sink, row.window = chain.streaming.window;
  row.copy_gbps = bandwidth.copy;
  return row;
}

// The same work per layer.
Row per_layer(Row row, int layers) {
  row.op = "layer";
  row.time = {row.time.p20 / layers, row.time.p50 / layers, row.time.p80 / layers};
  row.bytes /= layers;
  return row;
}

}  // namespace

void run_chain(Device& device, const Chain& chain, const Bandwidth& bandwidth, Table& table) {
  ChainProblem problem(device, chain);
  const double error = check_chain(device, chain, problem);
  std::vector<Device::Call> calls = {{[&](int set) { problem.step(set); }, [&](int) { problem.set_lengths(); }},
                                     {[&](int set) { problem.read(set); }}};
  if (chain.hidden > 0) calls.push_back({[&](int set) { problem.projections(set); }});
  const std::vector<std::vector<double>> samples = device.sample(calls, problem.num_sets(), 1);

  Row row = row_of(chain, bandwidth);
  const double floor = quantiles(samples[1]).p50;
  const auto add = [&](const char* impl, const std::vector<double>& microseconds, int64_t bytes, double relative_error,
                       bool with_floor) {
    row.op = "step", row.impl = impl, row.time = quantiles(microseconds), row.bytes = bytes, row.error = relative_error;
    row.percent_read = with_floor ? 100 * floor / row.time.p50 : 0;
    table.add(row);
    table.add(per_layer(row, chain.num_layers()));
  };
  if (chain.hidden == 0) {
    add("zigzag", samples[0], chain.kv_bytes(), error, true);
  } else {
    std::vector<double> difference;
    for (std::size_t i = 0; i < samples[0].size(); ++i) difference.push_back(samples[0][i] - samples[2][i]);
    add("gemm+zigzag", samples[0], chain.kv_bytes() + chain.weight_bytes(), error, false);
    add("gemm", samples[2], chain.weight_bytes(), 0, false);
    add("difference", difference, chain.kv_bytes(), error, true);
  }
  add("read", samples[1], chain.kv_bytes(), 0, true);
}

}  // namespace zigzag::bench
