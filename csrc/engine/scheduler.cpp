#include "engine/scheduler.h"

#include <initializer_list>

namespace zigzag {
namespace {

// Product of sizes; throws where it does not fit 63 bits, so that no wrapped byte count reaches an allocator.
int64_t checked_product(std::initializer_list<int64_t> factors) {
  int64_t product = 1;
  for (const int64_t factor : factors) {
    ZZ_CHECK(!__builtin_mul_overflow(product, factor, &product), "the caches would take more than 2^63 bytes");
  }
  return product;
}

const KvFormats& formats_of(const ModelGeometry& geometry, LayerKind kind) {
  return kind == LayerKind::kRetrieval ? geometry.retrieval : geometry.streaming;
}

int64_t layer_kv_bytes(const ModelGeometry& geometry, LayerKind kind, int64_t batch, int64_t slots) {
  int64_t pair_bytes = 0;  // a key and a value of one head
  for (const KvFormat format : {formats_of(geometry, kind).k, formats_of(geometry, kind).v}) {
    pair_bytes += vector_bytes(format, geometry.dtype, geometry.head_dim) + scale_bytes(format);
  }
  return checked_product({batch, geometry.num_kv_heads, pair_bytes, slots});
}

void check_cache_size(int64_t batch, int64_t max_len) {
  ZZ_CHECK(batch >= 0 && max_len >= 0, "batch and max_len must be >= 0, got batch ", batch, " and max_len ", max_len);
}

}  // namespace

Scheduler::Scheduler(const LayerPlan& plan, const ModelGeometry& geometry) : geometry_(geometry) {
  check_geometry(geometry.num_q_heads, geometry.num_kv_heads, geometry.head_dim);
  layers_.reserve(plan.kinds().size());
  for (const LayerKind kind : plan.kinds()) {
    const bool streaming = kind == LayerKind::kStreaming;
    layers_.push_back({kind, streaming ? plan.sink() : 0, streaming ? plan.window() : 0});
  }
}

const LayerSpec& Scheduler::layer(int layer) const {
  ZZ_CHECK(layer >= 0 && layer < num_layers(), "layer ", layer, " does not exist; the plan has layers 0 to ",
           num_layers() - 1);
  return layers_[layer];
}

KvBytes Scheduler::kv_bytes(int64_t batch, int64_t max_len) const {
  check_cache_size(batch, max_len);
  KvBytes bytes{0, 0};
  for (const LayerSpec& spec : layers_) {
    (spec.kind == LayerKind::kRetrieval ? bytes.retrieval : bytes.streaming) +=
        layer_kv_bytes(geometry_, spec.kind, batch, spec.slots(max_len));
  }
  return bytes;
}

int64_t Scheduler::all_retrieval_kv_bytes(int64_t batch, int64_t max_len) const {
  check_cache_size(batch, max_len);
  return checked_product({num_layers(), layer_kv_bytes(geometry_, LayerKind::kRetrieval, batch, max_len)});
}

int64_t Scheduler::workspace_bytes(int batch) const {
  return attention_workspace_bytes(batch, geometry_.num_q_heads, geometry_.num_kv_heads, geometry_.head_dim);
}

AttentionParams Scheduler::layer_params(int layer, AttentionParams tensors) const {
  const LayerSpec& spec = this->layer(layer);
  tensors.num_q_heads = geometry_.num_q_heads;
  tensors.num_kv_heads = geometry_.num_kv_heads;
  tensors.head_dim = geometry_.head_dim;
  tensors.dtype = geometry_.dtype;
  tensors.k_store.format = formats_of(geometry_, spec.kind).k;
  tensors.v_store.format = formats_of(geometry_, spec.kind).v;
  tensors.sink = spec.sink;
  tensors.window = spec.window;
  tensors.slots = static_cast<int>(spec.slots(tensors.slots));
  return tensors;
}

void Scheduler::run_layer_cpu(int layer, const AttentionParams& tensors, const ParallelFor& parallel) const {
  attention_cpu(layer_params(layer, tensors), parallel);
}

void Scheduler::run_layer_cuda(int layer, const AttentionParams& tensors, void* stream) const {
  attention_cuda(layer_params(layer, tensors), stream);
}

void Scheduler::step_cpu(const LayerTensors& tensors, const ParallelFor& parallel) const {
  for (int layer = 0; layer < num_layers(); ++layer) run_layer_cpu(layer, tensors(layer), parallel);
}

void Scheduler::step_cuda(const LayerTensors& tensors, void* stream) const {
  for (int layer = 0; layer < num_layers(); ++layer) run_layer_cuda(layer, tensors(layer), stream);
}

}  // namespace zigzag
