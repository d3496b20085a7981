// The weight-free solver: from a matrix of head scores to a kind for every layer. Needs no model, no weights and no
// GPU.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "core/layer_kind.h"

namespace zigzag {

// Borrowed row-major [layers, kv_heads] matrix: how much each KV head needs the whole context, 0 (streams) to 1
// (retrieves).
struct ScoreMatrix {
  const double* data;
  int layers;
  int kv_heads;

  double at(int layer, int head) const { return data[static_cast<int64_t>(layer) * kv_heads + head]; }
};

// What the layers of a plan may cost together. Integers, so that a choice that costs exactly the limit fits.
struct CostBudget {
  std::string name;                // as the caller calls it, for messages: "kv_bytes", "ms"
  std::vector<int64_t> retrieval;  // [layers] cost of each layer if it retrieves
  std::vector<int64_t> streaming;  // [layers] and if it streams
  int64_t limit = 0;
  double unit = 1.0;  // the caller's units per integer unit, for messages
};

// Exactly one of retrieval_layers and costs is given; the other members may stay as they are.
struct SolveOptions {
  std::string objective = "mean";
  std::optional<int> retrieval_layers;  // exactly so many retrieval layers
  std::optional<CostBudget> costs;
  std::vector<int> force_retrieval;  // layers that retrieve whatever their scores
  std::vector<int> force_streaming;
  std::optional<int> max_streaming_run;  // most streaming layers in a row, >= 1
  std::vector<int> stages;          // layers of each pipeline stage; all stages get the same number of retrieval layers
  std::optional<double> threshold;  // head mask: heads that score at least this are retrieval heads
  std::optional<double> sparsity;   // head mask: DuoAttention's share of streaming heads (solver/head_mask.h)
  std::optional<int> top_heads;     // "cvar": heads of each layer that count; default a quarter, rounded up
  std::vector<double> values;       // "knapsack": [layers] worth of each retrieval layer; default its mean score
};

struct Solution {
  std::vector<LayerKind> kinds;      // [layers]
  double objective_value;            // what the objective optimised; its description names the quantity
  double retained_score;             // share of the summed scores that lies in retrieval layers; 1 if all scores are 0
  std::vector<double> layer_values;  // [layers] how the objective rates each layer; all 0 where it rates none
  int mask_distance;                 // KV heads whose layer has the other kind than they have in the head mask
  int mask_heads;                    // retrieval heads in that mask
};

struct ObjectiveInfo {
  std::string name;
  std::string description;  // one line, for help texts
};

// Every objective that `solve` knows, in the order of the registry (solver/objectives.cpp).
std::vector<ObjectiveInfo> objectives();

// Number of retrieval layers at a ratio: retrieval_ratio * layers rounded to the nearest integer, halves up, computed
// in double precision. Throws on a ratio that is NaN or outside [0, 1].
int count_retrieval_layers(double retrieval_ratio, int layers);

// The best choice of layers under the objective that meets the budget and every constraint; exact.
//
// retrieval_layers is met exactly. A cost budget is a limit: objectives that rate a number of layers (even, count,
// transport) fill it with as many retrieval layers as fit, the others choose the best set that fits. Where the head
// mask is not given, it has the kv_heads highest scores per retrieval layer.
//
// Deterministic: scores and values are compared in steps of 2^-40 (of the largest one, for values), so equal sums are
// equal; of choices that serve equally well the one with the larger retained score wins (not for "even"), then the one
// whose first difference is a retrieval layer.
//
// Throws zigzag::Error on bad input, and where no choice meets the budget and the constraints; the message names those
// that conflict.
Solution solve(const ScoreMatrix& scores, const SolveOptions& options);

}  // namespace zigzag
