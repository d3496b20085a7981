// From a plan and a model's geometry to kernels and bytes: which kernel serves the heads of a layer, how many slots
// their cache has, what the caches weigh, and one attention launch per cache and step. Immutable after creation; needs
// neither Python nor torch. A CUDA build captures a step in a CUDA graph as it is: the lengths are read on the device.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "core/kv_bytes.h"
#include "core/parallel.h"
#include "core/params.h"
#include "engine/layer_plan.h"
#include "kernels/attention.h"

namespace zigzag {

struct ModelGeometry {
  int num_q_heads;
  int num_kv_heads;
  int head_dim;
  DType dtype;  // of q, k, v, plain caches and the output
  KvFormats retrieval = {};
  KvFormats streaming = {};  // of all rings
};

// The cache of the KV heads of one kind in a layer: of all its heads, or of those that a mixed layer has of that kind.
struct CacheSpec {
  LayerKind kind;
  int sink;      // 0 for retrieval and native
  int window;    // 0 for retrieval: marks a full cache
  int rollback;  // 0 for retrieval
  KvFormats formats;
  int num_kv_heads;            // of this cache
  std::vector<int32_t> heads;  // their numbers, ascending; empty where the cache has all heads of the layer

  AttentionKernel kernel(int q_len) const { return select_attention_kernel(window, q_len); }
  int64_t slots(int64_t max_len) const { return cache_slots(kind, sink, window, rollback, max_len); }
};

// Bytes of the key and value caches together, scales of quantised ones included.
struct KvBytes {
  int64_t retrieval;
  int64_t streaming;
  int64_t native;
  // 0 for layers without keys.
  int64_t of(LayerKind kind) const {
    switch (kind) {
      case LayerKind::kRetrieval: return retrieval;
      case LayerKind::kStreaming: return streaming;
      case LayerKind::kNative: return native;
      case LayerKind::kState: return 0;
    }
    return 0;
  }
  int64_t total() const { return retrieval + streaming + native; }
};

// What all layers of a step share.
struct Step {
  int batch;
  int q_len;
  int32_t* seq_lens;             // [cache rows] tokens held before the step; only a CapturedStep writes it
  const int32_t* pad = nullptr;  // [batch] leading columns that are padding; nullptr: none
  RowMap cache_rows = {};        // which rows of the caches and of seq_lens the batch has; by default its own
  // CUDA: at least attention_workspace_bytes(), zero before its first use ever. One serves all layers, which run one
  // after the other.
  void* workspace = nullptr;
  int64_t workspace_bytes = 0;
};

// One cache of a layer, as its CacheSpec has it. Strides as in AttentionParams; `batch` is the rows of the cache where
// the step has cache_rows.
struct CacheTensors {
  void *k = nullptr, *v = nullptr;  // [batch, num_kv_heads, slots, head_dim], codes where the format is quantised
  Strides k_stride = {}, v_stride = {};
  int64_t capacity = 0;                          // slots of a full cache; a ring has those of its CacheSpec
  float *k_scale = nullptr, *v_scale = nullptr;  // [batch, num_kv_heads, slots] where the format is quantised
  Strides k_scale_stride = {}, v_scale_stride = {};
  const int32_t* heads = nullptr;  // CacheSpec::heads on the device; on the CPU nullptr stands for them
};

// What one layer attends with and writes to in a step.
struct LayerTensors {
  const void *q, *k_new, *v_new;  // [batch, num_q_heads or num_kv_heads, q_len, head_dim]
  void* out;                      // like q
  float* lse;                     // [batch, num_q_heads, q_len] contiguous
  Strides q_stride, k_new_stride, v_new_stride, out_stride;
  float scale;                         // on q . k before the softmax
  float softcap = 0.0f;                // as in AttentionParams
  const float* sink_logits = nullptr;  // [num_q_heads] or nothing
  Rotary rotary = {};                  // nothing, or the tables of the positions of this step
  CacheTensors caches[2] = {};         // one per CacheSpec of the layer, in that order
};

class Scheduler {
 public:
  using LayerCall = std::function<LayerTensors(int layer)>;

  // `rollback`: slots that rings have beyond sink + window. Throws zigzag::Error on a geometry that no kernel supports,
  // on a plan for another number of KV heads, on rollback < 0 and on rings of 2^31 slots or more.
  Scheduler(const LayerPlan& plan, const ModelGeometry& geometry, int64_t rollback = 0);

  int num_layers() const { return static_cast<int>(layers_.size()); }
  // Attention launches in a decode step: one per layer, two where it is mixed, none where it keeps no keys.
  int launches_per_step() const;
  const ModelGeometry& geometry() const { return geometry_; }
  // One cache; two where the layer mixes heads of both kinds, retrieval first; none where it keeps no keys. Throws if
  // there is no such layer.
  const std::vector<CacheSpec>& caches(int layer) const;

  int64_t cache_bytes(const CacheSpec& cache, int64_t batch, int64_t max_len) const;
  KvBytes kv_bytes(int64_t batch, int64_t max_len) const;  // of all layers
  // Of the same model where every layer that keeps keys keeps all of them.
  int64_t all_retrieval_kv_bytes(int64_t batch, int64_t max_len) const;

  // What is launched for cache `cache` of a layer. Throws on tensors that its spec needs and that are missing.
  AttentionParams params(int layer, int cache, const Step& step, const LayerTensors& tensors) const;

  // Attention of one layer, which also appends the new tokens to its caches.
  void run_layer_cpu(int layer, const Step& step, const LayerTensors& tensors, const ParallelFor& parallel) const;
  void run_layer_cuda(int layer, const Step& step, const LayerTensors& tensors, void* stream) const;

  // All layers in order. `tensors(l)` is called after layer l - 1 was run (on CUDA: enqueued), so that it may compute
  // the queries, keys and values of layer l from the output of the layer before. Layers that keep no keys are left out:
  // they are the caller's to run. seq_lens is the caller's to advance, once per step.
  void step_cpu(const Step& step, const LayerCall& tensors, const ParallelFor& parallel) const;
  void step_cuda(const Step& step, const LayerCall& tensors, void* stream) const;

 private:
  std::vector<std::vector<CacheSpec>> layers_;
  ModelGeometry geometry_;
};

}  // namespace zigzag
