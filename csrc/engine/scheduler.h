// From a plan and a model's geometry to kernels and bytes: which kernel serves a layer, how many slots its cache has,
// what the caches weigh, and exactly one attention launch per layer and step. Immutable after creation; needs neither
// Python nor torch. A CUDA build captures a step in a CUDA graph as it is: the lengths are read on the device.
#pragma once

#include <functional>
#include <vector>

#include "core/parallel.h"
#include "core/params.h"
#include "engine/layer_plan.h"
#include "kernels/attention.h"

namespace zigzag {

// How one kind of layer holds its keys and its values.
struct KvFormats {
  KvFormat k = KvFormat::kPlain;
  KvFormat v = KvFormat::kPlain;
};

struct ModelGeometry {
  int num_q_heads;
  int num_kv_heads;
  int head_dim;
  DType dtype;  // of q, k, v, plain caches and the output
  KvFormats retrieval = {};
  KvFormats streaming = {};
};

struct LayerSpec {
  LayerKind kind;
  int sink;    // 0 for a retrieval layer
  int window;  // 0 for a retrieval layer: marks a full cache

  AttentionKernel kernel(int q_len) const { return select_attention_kernel(window, q_len); }

  // Slots of the layer's cache in a context of at most max_len tokens. A ring has all its slots from the start.
  int64_t slots(int64_t max_len) const { return window == 0 ? max_len : int64_t{sink} + window; }
};

// Bytes of the key and value caches together, scales of quantised ones included.
struct KvBytes {
  int64_t retrieval;
  int64_t streaming;
  int64_t total() const { return retrieval + streaming; }
};

class Scheduler {
 public:
  // The tensors of one layer: everything of AttentionParams but geometry, sink and window, which the scheduler fills
  // in. slots is read for a retrieval layer (the capacity of the cache) and filled in for a streaming one.
  using LayerTensors = std::function<AttentionParams(int layer)>;

  // Throws zigzag::Error on a geometry that no kernel supports.
  Scheduler(const LayerPlan& plan, const ModelGeometry& geometry);

  int num_layers() const { return static_cast<int>(layers_.size()); }
  int launches_per_step() const { return num_layers(); }  // attention launches in a decode step: one per layer
  const ModelGeometry& geometry() const { return geometry_; }
  const LayerSpec& layer(int layer) const;  // throws if there is no such layer

  KvBytes kv_bytes(int64_t batch, int64_t max_len) const;
  int64_t all_retrieval_kv_bytes(int64_t batch, int64_t max_len) const;  // of the same model without streaming layers
  int64_t workspace_bytes(int batch) const;  // one workspace serves all layers, as they run one after the other

  // `tensors` completed for `layer`: what run_layer_* launches.
  AttentionParams layer_params(int layer, AttentionParams tensors) const;

  // One attention call, which also appends the new tokens to the layer's cache.
  void run_layer_cpu(int layer, const AttentionParams& tensors, const ParallelFor& parallel) const;
  void run_layer_cuda(int layer, const AttentionParams& tensors, void* stream) const;

  // All layers in order, one attention call each. `tensors(l)` is called after layer l - 1 was run (on CUDA: enqueued),
  // so that it may compute the queries, keys and values of layer l from the output of the layer before. seq_lens is the
  // caller's to advance, once per step.
  void step_cpu(const LayerTensors& tensors, const ParallelFor& parallel) const;
  void step_cuda(const LayerTensors& tensors, void* stream) const;

 private:
  std::vector<LayerSpec> layers_;
  ModelGeometry geometry_;
};

}  // namespace zigzag
