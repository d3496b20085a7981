// The objectives and their registry. Each is exact: a closed form, with its reason beside it.
#include "solver/objectives.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <utility>

namespace zigzag::solver {
namespace {

// For every objective whose value is the sum of what its retrieval layers are worth: the largest values are the best
// set, since exchanging any member for a layer outside cannot raise the sum. The sort is stable, so the lower index
// wins a tie.
Choice choose_largest(const Problem& problem, std::vector<double> layer_values) {
  std::vector<int> order(layer_values.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return layer_values[a] > layer_values[b]; });
  Choice choice{std::vector<bool>(order.size(), false), 0.0, std::move(layer_values)};
  for (int rank = 0; rank < problem.retrieval_layers; ++rank) {
    choice.retrieval[order[rank]] = true;
    choice.value += choice.layer_values[order[rank]];
  }
  return choice;
}

// Optimal for three criteria at once. Let x_l = 1 for a retrieval layer, m_l the mean score and H the number of KV
// heads.
//   retained score   sum_l x_l H m_l                       is maximal at the K largest m_l;
//   L1 distance      sum_lh |x_l - S_lh|                    = sum_lh S_lh + sum_l x_l H (1 - 2 m_l), as S is in [0, 1];
//   L2 distance      sum_lh (x_l - S_lh)^2                  = sum_lh S_lh^2 + sum_l x_l H (1 - 2 m_l), as x_l^2 = x_l;
// and with K layers fixed both distances fall as the retained score rises.
Choice choose_mean(const Problem& problem) {
  const ScoreMatrix& scores = problem.scores;
  std::vector<double> means(scores.layers, 0.0);
  for (int layer = 0; layer < scores.layers; ++layer) {
    for (int head = 0; head < scores.kv_heads; ++head) means[layer] += scores.at(layer, head);
    means[layer] /= scores.kv_heads;
  }
  return choose_largest(problem, std::move(means));
}

// An even spread of K layers over L puts K (l + 1) / L of them among layers 0..l. The count of retrieval layers up to
// each layer is that number rounded: the nearest integer at every l, hence the least sum of distances, and since K <= L
// it grows by 0 or 1 per layer. Integer arithmetic rounds halves up exactly, which prefers the lower layer.
Choice choose_even(const Problem& problem) {
  const int64_t layers = problem.scores.layers;
  const int64_t target = problem.retrieval_layers;
  Choice choice{std::vector<bool>(layers, false), 0.0, std::vector<double>(layers, 0.0)};
  int64_t before = 0;
  for (int64_t layer = 0; layer < layers; ++layer) {
    const int64_t here = (2 * target * (layer + 1) + layers) / (2 * layers);
    choice.retrieval[layer] = here > before;
    choice.value +=
        std::abs(static_cast<double>(target * (layer + 1)) / static_cast<double>(layers) - static_cast<double>(here));
    before = here;
  }
  return choice;
}

}  // namespace

const std::vector<Objective>& registry() {
  static const std::vector<Objective> objectives = {
      {"mean", "largest mean scores: maximises their sum, and so the retained score", choose_mean},
      {"even", "evenly spaced layers, whatever the scores: minimises the distance from an even spread", choose_even},
  };
  return objectives;
}

}  // namespace zigzag::solver
