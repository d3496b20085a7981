// Every objective under every budget and every mix of constraints against all 2^layers choices, each rated by the
// objective's definition. Scores, values and costs are small multiples of powers of two: sums are exact and ties
// frequent.
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "core/error.h"
#include "solver/solve.h"

namespace {

using namespace zigzag;
using Mask = std::vector<bool>;
using Rank = std::array<double, 3>;  // compared part by part, larger is better

struct Instance {
  std::vector<double> cells;
  int layers, kv_heads;
  SolveOptions options;

  ScoreMatrix scores() const { return {cells.data(), layers, kv_heads}; }
  double sum(int layer) const {
    return std::accumulate(cells.begin() + layer * kv_heads, cells.begin() + (layer + 1) * kv_heads, 0.0);
  }
  double top_sum(int layer, int top) const {
    std::vector<double> row(cells.begin() + layer * kv_heads, cells.begin() + (layer + 1) * kv_heads);
    std::sort(row.rbegin(), row.rend());
    return std::accumulate(row.begin(), row.begin() + top, 0.0);
  }
};

int pick(std::mt19937& random, int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); }

std::vector<int> some_layers(std::mt19937& random, int layers, const std::vector<int>& taken) {
  std::vector<int> chosen;
  for (int layer = 0; layer < layers; ++layer) {
    if (pick(random, 0, 4) == 0 && std::count(taken.begin(), taken.end(), layer) == 0) chosen.push_back(layer);
  }
  return chosen;
}

// Bits of `mix`: force_retrieval, force_streaming, max_streaming_run, stages. budget: 0 a count, 1 a ratio, 2 equal
// costs as of bytes, 3 unequal costs as of milliseconds, where a retrieval layer may even be the cheaper one.
Instance random_instance(std::mt19937& random, const std::string& objective, int budget, int mix) {
  const int levels = 1 << (2 * pick(random, 0, 4));
  const int most_layers = pick(random, 0, 3) == 0 ? 14 : 11;  // fewer large ones: each layer doubles the choices
  Instance made{{}, pick(random, 1, most_layers), pick(random, 1, 5), {}};
  for (int i = 0; i < made.layers * made.kv_heads; ++i)
    made.cells.push_back(static_cast<double>(pick(random, 0, levels)) / levels);
  SolveOptions& options = made.options;
  options.objective = objective;
  if (mix & 1) options.force_retrieval = some_layers(random, made.layers, {});
  if (mix & 2) options.force_streaming = some_layers(random, made.layers, options.force_retrieval);
  if (mix & 4) options.max_streaming_run = pick(random, 1, 5);
  if (mix & 8) {
    for (int left = made.layers; left > 0; left -= options.stages.back())
      options.stages.push_back(pick(random, std::min(left, 2), std::min(left, 7)));
  }
  if (budget == 0) options.retrieval_layers = pick(random, 0, made.layers);
  if (budget == 1) options.retrieval_layers = count_retrieval_layers(pick(random, 0, 64) / 64.0, made.layers);
  if (budget >= 2) {
    CostBudget costs{"ms", std::vector<int64_t>(made.layers, 9), std::vector<int64_t>(made.layers, 2), 0, 1.0};
    for (int layer = 0; budget == 3 && layer < made.layers; ++layer) {
      costs.streaming[layer] = pick(random, 0, 3);
      costs.retrieval[layer] = pick(random, 1, 12);
    }
    costs.limit = pick(random, made.layers, 9 * made.layers);
    options.costs = costs;
  }
  if (pick(random, 0, 2) == 0) options.threshold = pick(random, 0, 8) / 8.0;
  if (!options.threshold && pick(random, 0, 2) == 0) options.sparsity = pick(random, 0, 8) / 8.0;
  if (objective == "cvar" && pick(random, 0, 3) > 0) options.top_heads = pick(random, 1, made.kv_heads);
  for (int layer = 0; objective == "knapsack" && mix % 3 > 0 && layer < made.layers; ++layer)
    options.values.push_back(pick(random, -2, 12) / 4.0);
  return made;
}

bool allowed(const SolveOptions& options, const Mask& mask) {
  const int layers = static_cast<int>(mask.size());
  if (options.retrieval_layers && std::count(mask.begin(), mask.end(), true) != *options.retrieval_layers) return false;
  for (const int layer : options.force_retrieval)
    if (!mask[layer]) return false;
  for (const int layer : options.force_streaming)
    if (mask[layer]) return false;
  int64_t cost = 0;
  for (int layer = 0, run = 0; layer < layers; ++layer) {
    run = mask[layer] ? 0 : run + 1;
    if (options.max_streaming_run && run > *options.max_streaming_run) return false;
    if (options.costs) cost += mask[layer] ? options.costs->retrieval[layer] : options.costs->streaming[layer];
  }
  if (options.costs && cost > options.costs->limit) return false;
  int first = 0, expected = -1;
  for (const int size : options.stages) {
    const int here = static_cast<int>(std::count(mask.begin() + first, mask.begin() + first + size, true));
    if (expected >= 0 && here != expected) return false;
    expected = here;
    first += size;
  }
  return true;
}

// DuoAttention's own rule, with noise that prefers lower layers and heads in place of its random noise.
std::vector<int> head_mask(const Instance& instance, int retrieval_layers) {
  const int heads = static_cast<int>(instance.cells.size());
  std::vector<double> noisy(instance.cells);
  for (int head = 0; head < heads; ++head) noisy[head] += 1e-9 * (heads - head);
  double threshold = 0.0;
  if (instance.options.threshold) {
    noisy = instance.cells;
    threshold = *instance.options.threshold;
  } else {
    const double sparsity =
        instance.options.sparsity.value_or(1.0 - static_cast<double>(retrieval_layers) / instance.layers);
    std::vector<double> sorted(noisy);
    std::sort(sorted.begin(), sorted.end());
    const double place = sparsity * (heads - 1);
    const int below = static_cast<int>(place);
    threshold = sorted[below] + (place - below) * (sorted[std::min(below + 1, heads - 1)] - sorted[below]);
    if (sparsity >= 1.0) threshold = 2.0;
    if (sparsity <= 0.0) threshold = -1.0;
  }
  std::vector<int> counts(instance.layers, 0);
  for (int head = 0; head < heads; ++head) counts[head / instance.kv_heads] += noisy[head] >= threshold;
  return counts;
}

// Work to move `mass` (one number per place) into the shape of `wanted`, place by place. Equal totals.
double moved(const std::vector<double>& mass, const std::vector<double>& wanted) {
  double carried = 0.0, work = 0.0;
  for (std::size_t place = 0; place < mass.size(); ++place) {
    carried += mass[place] - wanted[place];
    work += std::abs(carried);
  }
  return work;
}

Rank rank_of(const Instance& instance, const Mask& mask, const std::vector<int>& heads) {
  const std::string& objective = instance.options.objective;
  const int retrieval_layers = static_cast<int>(std::count(mask.begin(), mask.end(), true));
  const int top = instance.options.top_heads.value_or((instance.kv_heads + 3) / 4);
  const double total = std::accumulate(heads.begin(), heads.end(), 0.0);
  double retained = 0.0, best_kept = 0.0, worst_lost = 0.0, top_kept = 0.0, values = 0.0, hamming = 0.0;
  std::vector<double> spread, mass, wanted;
  for (int layer = 0; layer < instance.layers; ++layer) {
    const double best = instance.top_sum(layer, 1);
    if (mask[layer]) {
      retained += instance.sum(layer);
      best_kept += best;
      top_kept += instance.top_sum(layer, top);
      if (!instance.options.values.empty()) values += instance.options.values[layer];
    } else {
      worst_lost = std::max(worst_lost, best);
    }
    hamming += mask[layer] ? instance.kv_heads - heads[layer] : heads[layer];
    spread.push_back(retrieval_layers);  // of mass L * K in all: whole numbers
    mass.push_back(heads[layer] * retrieval_layers);
    wanted.push_back(mask[layer] ? total : 0.0);
  }
  if (objective == "mean") return {retained, 0, 0};
  if (objective == "count") return {-hamming, retained, 0};
  if (objective == "transport") return {-moved(mass, wanted), retained, 0};
  if (objective == "max") return {-worst_lost, best_kept, retained};
  if (objective == "cvar") return {top_kept, retained, 0};
  if (objective == "knapsack") return {instance.options.values.empty() ? retained : values, retained, 0};
  for (int layer = 0; layer < instance.layers; ++layer) wanted[layer] = mask[layer] ? instance.layers : 0.0;
  return {-moved(spread, wanted), 0, 0};
}

// Every choice, the ones that prefer lower layers first.
template <class Visit>
void each_choice(int layers, Visit&& visit) {
  Mask mask(layers);
  for (int bits = (1 << layers) - 1; bits >= 0; --bits) {
    for (int layer = 0; layer < layers; ++layer) mask[layer] = (bits >> (layers - 1 - layer)) & 1;
    if (!visit(mask)) return;
  }
}

bool possible(const SolveOptions& options, int layers) {
  bool found = false;
  each_choice(layers, [&](const Mask& mask) { return !(found = allowed(options, mask)); });
  return found;
}

std::optional<Mask> brute_force(Instance instance) {
  const std::string& objective = instance.options.objective;
  const bool fixed_count = objective == "count" || objective == "transport" || objective == "even";
  if (fixed_count && instance.options.costs) {
    // As many as fit at the average cost; where that many are impossible the next smaller number, then the next larger.
    const CostBudget& costs = *instance.options.costs;
    const double streaming = std::accumulate(costs.streaming.begin(), costs.streaming.end(), 0.0);
    const double retrieval = std::accumulate(costs.retrieval.begin(), costs.retrieval.end(), 0.0);
    int wanted = 0;
    for (int count = 0; count <= instance.layers; ++count) {
      const double share = static_cast<double>(count) / instance.layers;
      if (streaming + share * (retrieval - streaming) <= static_cast<double>(costs.limit) + 1e-9) wanted = count;
    }
    std::vector<bool> reachable(instance.layers + 1, false);
    each_choice(instance.layers, [&](const Mask& mask) {
      const auto count = std::count(mask.begin(), mask.end(), true);
      reachable[count] = reachable[count] || allowed(instance.options, mask);
      return true;
    });
    int count = wanted;
    while (count >= 0 && !reachable[count]) --count;
    if (count < 0) count = wanted + 1;
    while (count <= instance.layers && !reachable[count]) ++count;
    if (count > instance.layers) return std::nullopt;
    instance.options.retrieval_layers = count;
  }
  const std::vector<int> heads = head_mask(instance, instance.options.retrieval_layers.value_or(0));
  std::optional<Mask> best;
  Rank best_rank{};
  each_choice(instance.layers, [&](const Mask& mask) {
    if (!allowed(instance.options, mask)) return true;
    const Rank rank = rank_of(instance, mask, heads);
    if (!best || rank > best_rank) {
      best = mask;
      best_rank = rank;
    }
    return true;
  });
  return best;
}

// The constraints that a message names, dropped from `options` where `keep` is false for them.
SolveOptions only(const SolveOptions& options, const std::vector<bool>& keep) {
  SolveOptions kept = options;
  if (!keep[0]) kept.force_retrieval.clear();
  if (!keep[1]) kept.force_streaming.clear();
  if (!keep[2]) kept.max_streaming_run.reset();
  if (!keep[3]) kept.stages.clear();
  if (!keep[4]) {
    kept.retrieval_layers.reset();
    kept.costs.reset();
  }
  return kept;
}

// What the message names admits no choice, and does as soon as any one of it is lifted.
void check_conflict(const Instance& instance, const std::string& message) {
  const std::string constraints = message.substr(0, message.find(';'));
  std::vector<bool> named;
  for (const char* name :
       {"force_retrieval = ", "force_streaming = ", "max_streaming_run = ", "equal counts in stages of "})
    named.push_back(constraints.find(name) != std::string::npos);
  named.push_back(constraints.find("retrieval_layers = ") != std::string::npos ||
                  constraints.find("ms = ") != std::string::npos);
  CHECK(!possible(only(instance.options, named), instance.layers));
  for (std::size_t lifted = 0; lifted < named.size(); ++lifted) {
    if (!named[lifted]) continue;
    std::vector<bool> others = named;
    others[lifted] = false;
    CHECK(possible(only(instance.options, others), instance.layers));
  }
}

void check_objective(const std::string& objective) {
  constexpr int kInstances = 500;  // for each of 4 budgets, shared by the 16 mixes of constraints
  int solved = 0, refused = 0;
  for (int budget = 0; budget < 4; ++budget) {
    std::mt19937 random(budget);
    for (int i = 0; i < kInstances; ++i) {
      const Instance instance = random_instance(random, objective, budget, i % 16);
      const std::optional<Mask> expected = brute_force(instance);
      CAPTURE(budget);
      CAPTURE(i);
      Solution solution;
      try {
        solution = solve(instance.scores(), instance.options);
      } catch (const Error& error) {
        const std::string message = error.what();
        CAPTURE(message);
        if (message.find("nothing to move") != std::string::npos) continue;
        REQUIRE(!expected);
        if (refused++ % 8 == 0) check_conflict(instance, message);
        continue;
      }
      REQUIRE(expected);
      ++solved;
      Mask mask;
      for (const LayerKind kind : solution.kinds) mask.push_back(kind == LayerKind::kRetrieval);
      REQUIRE(mask == *expected);
      const int count = static_cast<int>(std::count(mask.begin(), mask.end(), true));
      const std::vector<int> heads = head_mask(instance, count);
      const Rank rank = rank_of(instance, mask, heads);
      const double total = std::accumulate(heads.begin(), heads.end(), 0.0);
      double value = rank[0];
      if (objective == "mean" || (objective == "knapsack" && instance.options.values.empty()))
        value /= instance.kv_heads;
      if (objective == "cvar") value /= instance.options.top_heads.value_or((instance.kv_heads + 3) / 4);
      if (objective == "count" || objective == "max") value = -value;
      if (objective == "even") value /= -instance.layers;
      if (objective == "transport") value = total > 0 ? -value * instance.kv_heads / total : 0.0;
      CHECK(solution.objective_value == doctest::Approx(value));
      Instance counted = instance;
      counted.options.objective = "count";
      counted.options.values.clear();
      CHECK(solution.mask_distance == -rank_of(counted, mask, heads)[0]);
      CHECK(solution.mask_heads == total);
    }
  }
  CHECK(solved > 1000);
  CHECK(refused > 100);
}

}  // namespace

TEST_CASE("brute force: every objective, budget and mix of constraints") {
  for (const ObjectiveInfo& objective : objectives()) {
    CAPTURE(objective.name);
    check_objective(objective.name);
  }
}
