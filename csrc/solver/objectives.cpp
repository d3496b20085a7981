// The objectives and their registry. Each turns scores into integers that `select` optimises exactly.
#include "solver/objectives.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>

#include "solver/head_mask.h"

namespace zigzag::solver {
namespace {

// Scores as integers: sums are exact in any order, so layers with equal scores tie. 1024 x 1024 of them fit 64 bits.
constexpr double kOne = static_cast<double>(int64_t{1} << 40);

int64_t fixed_point(double value) { return std::llround(value * kOne); }

// [layers] sums of each layer's `top` largest scores.
std::vector<int64_t> top_sums(const ScoreMatrix& scores, int top) {
  std::vector<int64_t> sums(scores.layers), row(scores.kv_heads);
  for (int layer = 0; layer < scores.layers; ++layer) {
    for (int head = 0; head < scores.kv_heads; ++head) row[head] = fixed_point(scores.at(layer, head));
    std::partial_sort(row.begin(), row.begin() + top, row.end(), std::greater<>());
    sums[layer] = std::accumulate(row.begin(), row.begin() + top, int64_t{0});
  }
  return sums;
}

std::vector<double> scaled(const std::vector<int64_t>& values, double unit) {
  std::vector<double> result;
  for (const int64_t value : values) result.push_back(unit * static_cast<double>(value));
  return result;
}

// Each retrieval layer is worth values[l] * unit. Without constraints the K largest are the best K layers, since
// exchanging a member for a layer outside cannot raise the sum. Equal sums are told apart by the retained score.
Rating rate_by(const Problem& problem, const std::vector<int64_t>& values, double unit) {
  const std::vector<int64_t> retained = top_sums(problem.scores, problem.scores.kv_heads);
  Rating rating{{}, scaled(values, unit), unit};
  for (int layer = 0; layer < problem.scores.layers; ++layer)
    rating.goal.gains.push_back({values[layer], retained[layer]});
  return rating;
}

// Optimal for three criteria at once. Let x_l = 1 for a retrieval layer, m_l the mean score and H the number of KV
// heads.
//   retained score   sum_l x_l H m_l                       is maximal at the K largest m_l;
//   L1 distance      sum_lh |x_l - S_lh|                    = sum_lh S_lh + sum_l x_l H (1 - 2 m_l), as S is in [0, 1];
//   L2 distance      sum_lh (x_l - S_lh)^2                  = sum_lh S_lh^2 + sum_l x_l H (1 - 2 m_l), as x_l^2 = x_l;
// and with K layers fixed both distances fall as the retained score rises.
Rating rate_mean(const Problem& problem) {
  const int kv_heads = problem.scores.kv_heads;
  return rate_by(problem, top_sums(problem.scores, kv_heads), 1.0 / (kOne * kv_heads));
}

// Mean of a layer's q best heads (the conditional value at risk, with losing a score as the loss): between the mean (q
// = H) and the best head alone (q = 1).
Rating rate_cvar(const Problem& problem) {
  const int top = problem.options.top_heads.value_or((problem.scores.kv_heads + 3) / 4);
  return rate_by(problem, top_sums(problem.scores, top), 1.0 / (kOne * top));
}

// The worst loss: the best head of all streaming layers. Choices that lose the same are told apart by the sum of the
// best heads that they keep, so that without constraints the K layers with the largest best heads are chosen.
Rating rate_max(const Problem& problem) {
  const std::vector<int64_t> best = top_sums(problem.scores, 1);
  Rating rating = rate_by(problem, best, 1.0 / kOne);
  rating.goal.exposures = best;
  return rating;
}

// Distance to the head mask M with c_l retrieval heads in layer l: sum_lh |x_l - M_lh| = sum_l c_l + sum_l x_l (H - 2
// c_l).
Rating rate_count(const Problem& problem) {
  const std::vector<int> mask = mask_heads_per_layer(problem.scores, problem.options, problem.retrieval_layers);
  std::vector<int64_t> gains;
  for (const int heads : mask) gains.push_back(2 * heads - problem.scores.kv_heads);
  Rating rating = rate_by(problem, gains, -1.0);
  rating.layer_values.assign(mask.begin(), mask.end());
  rating.offset = std::accumulate(mask.begin(), mask.end(), 0.0);
  return rating;
}

// Earth mover's distance over depth: the retrieval heads of the mask, C(l) of them in layers 0..l and C in all, are
// moved along the layers until K layers hold H each; where C is not H K, each head weighs H K / C. In one dimension the
// least work is the sum of the distances of the cumulative sums, sum_l |H k(l) - C(l) H K / C| with k(l) retrieval
// layers in 0..l, here times C / H. C = H K and no constraints: k(l) is C(l) / H rounded, a step of 0 or 1 as c_l <= H.
Rating rate_transport(const Problem& problem) {
  const std::vector<int> mask = mask_heads_per_layer(problem.scores, problem.options, problem.retrieval_layers);
  const int64_t total = std::accumulate(mask.begin(), mask.end(), int64_t{0});
  ZZ_CHECK(total > 0 || problem.retrieval_layers == 0,
           "objective \"transport\" has nothing to move: no head is a retrieval head at this threshold or sparsity");
  Rating rating = rate_by(problem, std::vector<int64_t>(mask.size(), 0),
                          total > 0 ? -static_cast<double>(problem.scores.kv_heads) / static_cast<double>(total) : 0.0);
  int64_t so_far = 0;
  for (const int heads : mask) rating.goal.targets.push_back(problem.retrieval_layers * (so_far += heads));
  rating.goal.step = total;
  rating.layer_values.assign(mask.begin(), mask.end());
  return rating;
}

// An even spread of K layers over L puts K (l + 1) / L of them among layers 0..l; the value is the sum of the distances
// of the counts from that. Without constraints the count is that number rounded to the nearest, halves up.
Rating rate_even(const Problem& problem) {
  const int layers = problem.scores.layers;
  Rating rating{{}, std::vector<double>(layers, 0.0), -1.0 / layers};
  rating.goal.gains.resize(layers);
  for (int64_t layer = 0; layer < layers; ++layer)
    rating.goal.targets.push_back(problem.retrieval_layers * (layer + 1));
  rating.goal.step = layers;
  return rating;
}

// The caller's own values, such as measured drops in quality; with unequal costs, a knapsack. They are scaled by a
// power of two, which keeps sums of short binary fractions exact.
Rating rate_knapsack(const Problem& problem) {
  if (problem.options.values.empty()) return rate_mean(problem);
  double largest = 0.0;
  for (const double value : problem.options.values) largest = std::max(largest, std::abs(value));
  int exponent = 0;
  std::frexp(largest, &exponent);
  std::vector<int64_t> values;
  for (const double value : problem.options.values) values.push_back(fixed_point(std::ldexp(value, -exponent)));
  Rating rating = rate_by(problem, values, std::ldexp(1.0 / kOne, exponent));
  rating.layer_values = problem.options.values;
  return rating;
}

}  // namespace

const std::vector<Objective>& registry() {
  static const std::vector<Objective> objectives = {
      {"mean", "largest mean scores: most retained score, least L1 and L2 distance from the scores", false, nullptr,
       rate_mean},
      {"count", "fewest heads that get the other kind than in DuoAttention's head mask", true, nullptr, rate_count},
      {"transport", "least work to move the head mask's retrieval heads along the layers into whole layers", true,
       nullptr, rate_transport},
      {"max", "smallest largest score of a head that streams", false, nullptr, rate_max},
      {"cvar", "largest means of each layer's top heads", false, "top_heads", rate_cvar},
      {"knapsack", "largest sum of your own layer values (default: mean scores) within the budget", false, "values",
       rate_knapsack},
      {"even", "evenly spaced layers, whatever the scores: least distance from an even spread", true, nullptr,
       rate_even},
  };
  return objectives;
}

}  // namespace zigzag::solver
