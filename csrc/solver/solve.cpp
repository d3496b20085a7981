#include "solver/solve.h"

#include <cmath>
#include <numeric>

#include "solver/conflict.h"
#include "solver/head_mask.h"
#include "solver/objectives.h"

namespace zigzag {
namespace {

constexpr int kMostRows = 1024;                     // layers, KV heads: sums of fixed-point scores fit 64 bits
constexpr int64_t kLargestCost = int64_t{1} << 42;  // 1024 times a sum over 1024 layers fits 64 bits

void check_scores(const ScoreMatrix& scores) {
  ZZ_CHECK(scores.layers >= 1 && scores.kv_heads >= 1 && scores.layers <= kMostRows && scores.kv_heads <= kMostRows,
           "scores must have 1 to ", kMostRows, " layers and KV heads, got [", scores.layers, ", ", scores.kv_heads,
           "]");
  for (int layer = 0; layer < scores.layers; ++layer) {
    for (int head = 0; head < scores.kv_heads; ++head) {
      const double score = scores.at(layer, head);
      ZZ_CHECK(score >= 0.0 && score <= 1.0, "scores must lie in [0, 1], got ", score, " at layer ", layer,
               ", KV head ", head);
    }
  }
}

const solver::Objective& find_objective(const std::string& wanted) {
  std::string known;
  for (const solver::Objective& objective : solver::registry()) {
    if (wanted == objective.name) return objective;
    known += (known.empty() ? "" : ", ") + std::string(objective.name);
  }
  throw Error(concat("unknown objective \"", wanted, "\"; known: ", known));
}

void check_share(const char* name, const std::optional<double>& value) {
  ZZ_CHECK(!value || (*value >= 0.0 && *value <= 1.0), name, " must lie in [0, 1], got ", *value);
}

void check_objective_options(const solver::Objective& objective, const SolveOptions& options,
                             const ScoreMatrix& scores) {
  const std::string own = objective.option == nullptr ? "" : objective.option;
  ZZ_CHECK(!options.top_heads || own == "top_heads", "top_heads belongs to objective \"cvar\", got it with \"",
           objective.name, "\"");
  ZZ_CHECK(options.values.empty() || own == "values", "values belong to objective \"knapsack\", got them with \"",
           objective.name, "\"");
  ZZ_CHECK(!options.top_heads || (*options.top_heads >= 1 && *options.top_heads <= scores.kv_heads),
           "top_heads must lie in [1, ", scores.kv_heads, "], the KV heads, got ", *options.top_heads);
  ZZ_CHECK(options.values.empty() || options.values.size() == static_cast<std::size_t>(scores.layers),
           "values must be one per layer, ", scores.layers, ", got ", options.values.size());
  for (const double value : options.values) ZZ_CHECK(std::isfinite(value), "values must be finite, got ", value);
  check_share("threshold", options.threshold);
  check_share("sparsity", options.sparsity);
  ZZ_CHECK(!options.threshold || !options.sparsity, "threshold and sparsity both describe the head mask: give one");
}

void check_budget(const SolveOptions& options, int layers) {
  ZZ_CHECK(options.retrieval_layers.has_value() != options.costs.has_value(),
           "one budget is needed: retrieval_layers or costs");
  if (!options.costs) {
    ZZ_CHECK(*options.retrieval_layers >= 0 && *options.retrieval_layers <= layers, "retrieval_layers must lie in [0, ",
             layers, "], the layers, got ", *options.retrieval_layers);
    return;
  }
  const CostBudget& costs = *options.costs;
  for (const std::vector<int64_t>* given : {&costs.retrieval, &costs.streaming}) {
    ZZ_CHECK(given->size() == static_cast<std::size_t>(layers), "costs of ", costs.name, " must be one per layer, ",
             layers, ", got ", given->size());
    for (const int64_t cost : *given)
      ZZ_CHECK(cost >= 0 && cost <= kLargestCost, "costs of ", costs.name, " must lie in [0, 2^42] units, got ", cost);
  }
  ZZ_CHECK(costs.limit >= 0 && costs.limit <= kMostRows * kLargestCost, costs.name, " must lie in [0, ",
           static_cast<double>(kMostRows * kLargestCost) * costs.unit, "], got ",
           static_cast<double>(costs.limit) * costs.unit);
}

std::vector<bool> forced_layers(const char* name, const std::vector<int>& forced, int layers) {
  std::vector<bool> mask(layers, false);
  for (const int layer : forced) {
    ZZ_CHECK(layer >= 0 && layer < layers, name, " must hold layers 0 to ", layers - 1, ", got ", layer);
    mask[layer] = true;
  }
  return mask;
}

solver::Limits limits_of(const SolveOptions& options, int layers) {
  check_budget(options, layers);
  solver::Limits limits;
  limits.layers = layers;
  limits.count = options.retrieval_layers;
  limits.retrieval = forced_layers("force_retrieval", options.force_retrieval, layers);
  limits.streaming = forced_layers("force_streaming", options.force_streaming, layers);
  for (int layer = 0; layer < layers; ++layer) {
    ZZ_CHECK(!limits.retrieval[layer] || !limits.streaming[layer], "layer ", layer,
             " is in both force_retrieval and force_streaming");
  }
  limits.max_streaming_run = options.max_streaming_run;
  ZZ_CHECK(!options.max_streaming_run || *options.max_streaming_run >= 1, "max_streaming_run must be at least 1, got ",
           *options.max_streaming_run);
  limits.stages = options.stages;
  int64_t in_stages = 0;
  for (const int size : options.stages) {
    ZZ_CHECK(size >= 1, "every stage must have at least one layer, got ", size);
    in_stages += size;
  }
  ZZ_CHECK(options.stages.empty() || in_stages == layers, "stages must add up to the ", layers, " layers, got ",
           in_stages);
  if (options.costs) {
    limits.cost_limit = options.costs->limit;
    for (int layer = 0; layer < layers; ++layer) {
      limits.costs.push_back(options.costs->retrieval[layer] - options.costs->streaming[layer]);
      limits.cost_limit -= options.costs->streaming[layer];
    }
  }
  return limits;
}

// An objective that compares choices of one size only takes from a cost budget the number of retrieval layers that it
// holds at the average cost of a layer (exact where all cost the same), else the next smaller possible one, else the
// next larger.
std::vector<std::optional<int>> counts_to_try(const solver::Objective& objective, const solver::Limits& limits) {
  if (!objective.fixed_count || limits.count) return {limits.count};
  const int64_t all = std::accumulate(limits.costs.begin(), limits.costs.end(), int64_t{0});
  int held = limits.layers;
  while (held > 0 && held * all > limits.layers * limits.cost_limit) --held;
  std::vector<std::optional<int>> counts;
  for (int count = held; count >= 0; --count) counts.push_back(count);
  for (int count = held + 1; count <= limits.layers; ++count) counts.push_back(count);
  return counts;
}

double retained_share(const ScoreMatrix& scores, const std::vector<bool>& retrieval) {
  double retained = 0.0, total = 0.0;
  for (int layer = 0; layer < scores.layers; ++layer) {
    for (int head = 0; head < scores.kv_heads; ++head) {
      total += scores.at(layer, head);
      if (retrieval[layer]) retained += scores.at(layer, head);
    }
  }
  return total > 0.0 ? retained / total : 1.0;
}

}  // namespace

std::vector<ObjectiveInfo> objectives() {
  std::vector<ObjectiveInfo> infos;
  for (const solver::Objective& objective : solver::registry())
    infos.push_back({objective.name, objective.description});
  return infos;
}

int count_retrieval_layers(double retrieval_ratio, int layers) {
  ZZ_CHECK(retrieval_ratio >= 0.0 && retrieval_ratio <= 1.0, "retrieval_ratio must lie in [0, 1], got ",
           retrieval_ratio);
  return static_cast<int>(std::round(retrieval_ratio * layers));
}

Solution solve(const ScoreMatrix& scores, const SolveOptions& options) {
  const solver::Objective& objective = find_objective(options.objective);
  check_scores(scores);
  check_objective_options(objective, options, scores);
  solver::Limits limits = limits_of(options, scores.layers);
  solver::Rating rating;
  std::optional<solver::Selection> selection;
  for (const std::optional<int> count : counts_to_try(objective, limits)) {
    limits.count = count;
    rating = objective.rate({scores, options, count.value_or(-1)});
    selection = solver::select(rating.goal, limits);
    if (selection) break;
  }
  if (!selection) throw Error(solver::explain_conflict(limits_of(options, scores.layers), options));

  const std::int64_t reached = rating.goal.exposures.empty() ? selection->value.first : selection->exposure;
  Solution solution{};
  solution.objective_value = rating.offset + rating.unit * static_cast<double>(reached);
  solution.retained_score = retained_share(scores, selection->retrieval);
  solution.layer_values = std::move(rating.layer_values);
  int retrieval_layers = 0;
  for (const bool retrieval : selection->retrieval) {
    solution.kinds.push_back(retrieval ? LayerKind::kRetrieval : LayerKind::kStreaming);
    retrieval_layers += retrieval;
  }
  const std::vector<int> mask = solver::mask_heads_per_layer(scores, options, retrieval_layers);
  solution.mask_heads = std::accumulate(mask.begin(), mask.end(), 0);
  for (int layer = 0; layer < scores.layers; ++layer)
    solution.mask_distance += selection->retrieval[layer] ? scores.kv_heads - mask[layer] : mask[layer];
  return solution;
}

}  // namespace zigzag
