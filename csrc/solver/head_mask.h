// DuoAttention's deployment rule: which KV heads would retrieve if every head could choose for itself.
#pragma once

#include <vector>

#include "solver/solve.h"

namespace zigzag::solver {

// Retrieval heads per layer, [layers], of the mask that options ask for:
//   threshold   heads that score at least this;
//   sparsity s  the n - ceil(s (n - 1)) best of all n heads (all for s <= 0, none for s >= 1): what is left at or above
//               the s-quantile, as DuoAttention computes it (duo_attn/utils.py, sparsify_attention_heads). It breaks
//               ties by random noise; here the lower layer wins, then the lower head;
//   neither     the kv_heads best per retrieval layer: the same at s = 1 - retrieval_layers / layers.
std::vector<int> mask_heads_per_layer(const ScoreMatrix& scores, const SolveOptions& options, int retrieval_layers);

}  // namespace zigzag::solver
