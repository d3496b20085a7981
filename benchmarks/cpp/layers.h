// A chain of layers: one decode step of a model's attention, with or without the matrix products between the layers.
#pragma once

#include "cell.h"

namespace zigzag::bench {

struct Chain {
  std::string scenario;
  std::vector<LayerKind> kinds;
  Cell retrieval, streaming;  // of a layer of each kind
  int hidden;                 // width of the model between the layers' projections; 0: attention alone

  int num_layers() const { return static_cast<int>(kinds.size()); }
  const Cell& cell(int layer) const {
    return kinds[static_cast<std::size_t>(layer)] == LayerKind::kRetrieval ? retrieval : streaming;
  }
  int64_t kv_bytes() const;      // of a step
  int64_t weight_bytes() const;  // of the projections of all layers
};

// The buffers of a chain. Every layer has caches of its own, in as many sets as it takes to span kColdBytes: one for a
// model whose caches are larger than that. Activations are few and shared by the sets, as a model's are.
//
// Attention alone: layer l + 1 queries with the output of layer l. With projections: the output goes through
// [num_q_heads * head_dim -> hidden] and [hidden -> queries, keys, values] to the next layer.
class ChainProblem {
 public:
  ChainProblem(Device& device, const Chain& chain);

  int num_sets() const { return num_sets_; }
  AttentionParams params(int set, int layer) const;  // complete, as the scheduler launches it

  void set_lengths();  // as they are before a step, which advances them on CUDA
  void step(int set) { steps_[static_cast<std::size_t>(set)](); }  // all of it
  void projections(int set);                                       // all of it but the attention
  void read(int set);                                              // a pure read of the caches

 private:
  struct Layer {
    char *k_cache, *v_cache;  // [sets][cache]
    char *qkv, *out;  // [batch, q_len, num_q_heads + 2 num_kv_heads, head_dim], [batch, q_len, num_q_heads, head_dim]
    float* lse;
    char *qkv_weight, *out_weight, *input;  // input: [batch, q_len, hidden]; nullptr without projections
  };
  char* allocate(int64_t bytes);
  char* random(int64_t count, float sigma);
  void allocate_layer(const Cell& cell, bool first);
  void project_in(int layer);
  void project_out(int layer);
  void prepare_step(int set);
  LayerTensors tensors(int set, int layer) const;

  Device& device_;
  Chain chain_;
  Scheduler scheduler_;
  int num_sets_;
  std::vector<std::shared_ptr<void>> buffers_;
  std::vector<Layer> layers_;
  std::vector<std::function<void()>> steps_;  // [sets]
  char* final_;                               // [batch, q_len, hidden]: what follows the last layer
  Step step_{};
  LayerTensors shared_{};  // what all layers have alike
};

// Checks, times and reports the chain: rows for the step and for its mean layer.
void run_chain(Device& device, const Chain& chain, const Bandwidth& bandwidth, Table& table);

}  // namespace zigzag::bench
