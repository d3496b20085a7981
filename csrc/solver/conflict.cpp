#include "solver/conflict.h"

#include <algorithm>
#include <functional>
#include <utility>

namespace zigzag::solver {
namespace {

struct Constraint {
  std::string text;
  std::function<void(Limits&)> lift;
};

std::string list(const std::vector<int>& layers) {
  std::string text;
  for (const int layer : layers) text += (text.empty() ? "" : ", ") + std::to_string(layer);
  return "[" + text + "]";
}

std::string amount(double value, double unit) {
  return unit == 1.0 ? std::to_string(static_cast<int64_t>(value)) : concat(value * unit);
}

void lift_budget(Limits& limits) {
  limits.count.reset();
  limits.costs.clear();
}

std::vector<Constraint> constraints_of(const SolveOptions& options) {
  std::vector<Constraint> constraints;
  if (!options.force_retrieval.empty()) {
    constraints.push_back({"force_retrieval = " + list(options.force_retrieval),
                           [](Limits& limits) { limits.retrieval.assign(limits.layers, false); }});
  }
  if (!options.force_streaming.empty()) {
    constraints.push_back({"force_streaming = " + list(options.force_streaming),
                           [](Limits& limits) { limits.streaming.assign(limits.layers, false); }});
  }
  if (options.max_streaming_run) {
    constraints.push_back({concat("max_streaming_run = ", *options.max_streaming_run),
                           [](Limits& limits) { limits.max_streaming_run.reset(); }});
  }
  if (options.stages.size() > 1) {
    constraints.push_back({"equal counts in stages of " + list(options.stages) + " layers",
                           [](Limits& limits) { limits.stages.clear(); }});
  }
  constraints.push_back({options.costs ? concat(options.costs->name, " = ",
                                                amount(static_cast<double>(options.costs->limit), options.costs->unit))
                                       : concat("retrieval_layers = ", *options.retrieval_layers),
                         lift_budget});
  return constraints;
}

Goal sum_of(const std::vector<int64_t>& gains) {
  Goal goal;
  for (const int64_t gain : gains) goal.gains.push_back({gain, 0});
  return goal;
}

bool possible(const Limits& limits) {
  return select(sum_of(std::vector<int64_t>(limits.layers, 0)), limits).has_value();
}

// "4, 6, 8": the counts of retrieval layers that the limits without their budget admit.
std::string possible_counts(Limits limits) {
  std::vector<int> counts;
  lift_budget(limits);
  for (int count = 0; count <= limits.layers; ++count) {
    limits.count = count;
    if (possible(limits)) counts.push_back(count);
  }
  const bool all = !counts.empty() && counts.back() - counts.front() + 1 == static_cast<int>(counts.size());
  return all && counts.size() > 2 ? concat(counts.front(), " to ", counts.back()) : list(counts);
}

// The cheapest choice that the limits admit, in the caller's units; every streaming layer counts too.
std::string least_cost(Limits limits, const CostBudget& budget) {
  std::vector<int64_t> savings;
  int64_t total = 0;
  for (int layer = 0; layer < limits.layers; ++layer) {
    savings.push_back(budget.streaming[layer] - budget.retrieval[layer]);
    total += budget.streaming[layer];
  }
  lift_budget(limits);
  const Selection cheapest = *select(sum_of(savings), limits);
  return amount(static_cast<double>(total - cheapest.value.first), budget.unit);
}

}  // namespace

std::string explain_conflict(const Limits& limits, const SolveOptions& options) {
  // What can be lifted without making a choice possible plays no part; what remains conflicts, and all of it is needed.
  Limits lifted = limits;
  std::vector<Constraint> conflicting;
  for (const Constraint& constraint : constraints_of(options)) {
    Limits without = lifted;
    constraint.lift(without);
    if (possible(without)) {
      conflicting.push_back(constraint);
    } else {
      lifted = without;
    }
  }
  std::string text;
  for (const Constraint& constraint : conflicting) text += (text.empty() ? "" : ", ") + constraint.text;
  text = conflicting.size() == 1 ? text + " cannot be met" : "no choice of layers meets all of: " + text;
  const bool budget_conflicts = lifted.count || !lifted.costs.empty();
  if (!budget_conflicts) return text;
  return text + (options.costs
                     ? "; the cheapest possible " + options.costs->name + " is " + least_cost(lifted, *options.costs)
                     : "; possible retrieval_layers: " + possible_counts(lifted));
}

}  // namespace zigzag::solver
