#include "solver/head_mask.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace zigzag::solver {

std::vector<int> mask_heads_per_layer(const ScoreMatrix& scores, const SolveOptions& options, int retrieval_layers) {
  const int heads = scores.layers * scores.kv_heads;
  std::vector<int> counts(scores.layers, 0);
  if (options.threshold) {
    for (int head = 0; head < heads; ++head) counts[head / scores.kv_heads] += scores.data[head] >= *options.threshold;
    return counts;
  }
  int kept = retrieval_layers * scores.kv_heads;
  if (options.sparsity) {
    const double s = *options.sparsity;
    kept = s <= 0.0 ? heads : s >= 1.0 ? 0 : heads - static_cast<int>(std::ceil(s * (heads - 1)));
  }
  std::vector<int> order(heads);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return scores.data[a] > scores.data[b]; });
  for (int rank = 0; rank < kept; ++rank) ++counts[order[rank] / scores.kv_heads];
  return counts;
}

}  // namespace zigzag::solver
