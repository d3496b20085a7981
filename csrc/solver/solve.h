// The weight-free solver: from a matrix of head scores to a kind for every layer. Needs no model, no weights and no
// GPU.
#pragma once

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

struct Solution {
  std::vector<LayerKind> kinds;      // [layers]
  double objective_value;            // what the objective optimised; its description names the quantity
  double retained_score;             // share of the summed scores that lies in retrieval layers; 1 if all scores are 0
  std::vector<double> layer_values;  // [layers] how the objective rates each layer; all 0 where it rates none
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

// Makes exactly count_retrieval_layers(...) layers retrieval layers, the best ones under `objective`. Deterministic: of
// layers that serve equally well the lower index becomes a retrieval layer. Throws zigzag::Error on an empty matrix, a
// score that is not in [0, 1] (NaN included), a bad ratio, or an unknown objective (the message lists the known ones).
Solution solve(const ScoreMatrix& scores, double retrieval_ratio, const std::string& objective);

}  // namespace zigzag
