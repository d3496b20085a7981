// Backwards over the layers, a state is what the layers before have fixed: the number of retrieval layers among them
// and the length of the streaming run they end in, each only where something depends on it. A state holds the Pareto
// front of (cost, value) over all choices for the layers from here on; without a cost budget that is one entry.
// Forwards, the best choice is read off, a retrieval layer first wherever it loses nothing.
#include "solver/select.h"

#include <algorithm>
#include <cstddef>
#include <cstdlib>

#include "core/error.h"

namespace zigzag::solver {
namespace {

constexpr std::size_t kMostEntries = std::size_t{1} << 24;  // 400 MB; reached by many layers of unrelated costs only

struct Entry {
  int64_t cost;
  Value value;
};

// Within a state entries ascend in cost, and strictly in value.
struct Layer {
  std::vector<std::size_t> starts;  // [states + 1] into entries
  std::vector<Entry> entries;
};

struct Span {
  const Entry* begin;
  const Entry* end;
};

class Program {
 public:
  Program(const Goal& goal, const Limits& limits)
      : goal_(goal),
        limits_(limits),
        counted_(limits.count.has_value()),
        run_states_(limits.max_streaming_run.value_or(limits.layers) < limits.layers ? *limits.max_streaming_run + 1
                                                                                     : 1) {}

  std::optional<Selection> solve() {
    if (!bound_counts()) return std::nullopt;
    bound_costs();
    const int layers = limits_.layers;
    layers_.assign(layers + 1, {});
    layers_[layers].starts.push_back(0);
    for (int run = 0; run < run_states_; ++run) {
      layers_[layers].entries.push_back({0, {}});
      close_state(layers_[layers]);
    }
    for (int layer = layers - 1; layer >= 0; --layer) fill(layer);
    return read_off();
  }

 private:
  // Counts before each layer: [least_, most_], all 0 where counts do not matter. False if the stages admit none.
  bool bound_counts() {
    least_.assign(limits_.layers + 1, 0);
    most_.assign(limits_.layers + 1, 0);
    if (!counted_) return true;
    const std::vector<int> stages = limits_.stages.empty() ? std::vector<int>{limits_.layers} : limits_.stages;
    const int stage_count = static_cast<int>(stages.size());
    if (*limits_.count % stage_count != 0) return false;
    const int per_stage = *limits_.count / stage_count;
    int layer = 0, before = 0;
    for (const int size : stages) {
      if (per_stage > size) return false;
      for (int i = 0; i < size; ++i, ++layer) {
        least_[layer] = before + std::max(0, per_stage - (size - i));
        most_[layer] = before + std::min(i, per_stage);
      }
      before += per_stage;
    }
    least_[layer] = most_[layer] = before;
    return true;
  }

  // Of the budget, [least_left_, most_left_] can be left when a layer is reached.
  void bound_costs() {
    if (limits_.costs.empty()) return;
    least_left_.assign(limits_.layers + 1, limits_.cost_limit);
    most_left_ = least_left_;
    for (int layer = 0; layer < limits_.layers; ++layer) {
      const int64_t cost = limits_.costs[layer];
      const int64_t low = limits_.retrieval[layer] ? cost : limits_.streaming[layer] ? 0 : std::min<int64_t>(cost, 0);
      const int64_t high = limits_.retrieval[layer] ? cost : limits_.streaming[layer] ? 0 : std::max<int64_t>(cost, 0);
      least_left_[layer + 1] = least_left_[layer] - high;
      most_left_[layer + 1] = most_left_[layer] - low;
    }
  }

  int64_t cost(int layer) const { return limits_.costs.empty() ? 0 : limits_.costs[layer]; }

  Value gain(int layer, int count_before, bool retrieval) const {
    Value value = retrieval ? goal_.gains[layer] : Value{};
    if (!goal_.targets.empty())
      value.first -= std::abs(goal_.targets[layer] - goal_.step * (count_before + (retrieval ? 1 : 0)));
    return value;
  }

  int run_after(int run, bool retrieval) const { return retrieval || run_states_ == 1 ? 0 : run + 1; }

  // The front of the state that follows if `layer` gets this kind; empty if it may not.
  Span next(int layer, int count, int run, bool retrieval) const {
    if (retrieval ? limits_.streaming[layer] : limits_.retrieval[layer]) return {};
    const int next_count = count + (retrieval && counted_ ? 1 : 0);
    if (next_count < least_[layer + 1] || next_count > most_[layer + 1]) return {};
    const int next_run = run_after(run, retrieval);
    if (next_run >= run_states_) return {};
    return front(layer + 1, next_count, next_run);
  }

  Span front(int layer, int count, int run) const {
    const Layer& at = layers_[layer];
    const std::size_t state = static_cast<std::size_t>(count - least_[layer]) * run_states_ + run;
    return {at.entries.data() + at.starts[state], at.entries.data() + at.starts[state + 1]};
  }

  void fill(int layer) {
    Layer& at = layers_[layer];
    at.starts.push_back(0);
    for (int count = least_[layer]; count <= most_[layer]; ++count) {
      for (int run = 0; run < run_states_; ++run) {
        if (run <= layer) merge(layer, count, run);
        close_state(at);
      }
    }
    entries_ += at.entries.size();
    ZZ_CHECK(entries_ <= kMostEntries, "the costs of the ", limits_.layers,
             " layers differ in too many ways to search exactly: round them to fewer digits");
  }

  // Two sorted fronts, each shifted by what its kind costs and gains, become one.
  void merge(int layer, int count, int run) {
    Span kinds[2] = {next(layer, count, run, false), next(layer, count, run, true)};
    const Value gains[2] = {gain(layer, count, false), gain(layer, count, true)};
    const int64_t costs[2] = {0, cost(layer)};
    const std::size_t start = layers_[layer].starts.back();
    while (kinds[0].begin != kinds[0].end || kinds[1].begin != kinds[1].end) {
      const bool one = kinds[0].begin == kinds[0].end ||
                       (kinds[1].begin != kinds[1].end && kinds[1].begin->cost + costs[1] < kinds[0].begin->cost);
      const Entry entry{kinds[one].begin->cost + costs[one], kinds[one].begin->value + gains[one]};
      ++kinds[one].begin;
      push(layer, start, entry);
    }
  }

  void push(int layer, std::size_t start, const Entry& entry) {
    std::vector<Entry>& entries = layers_[layer].entries;
    const bool first = entries.size() == start;
    if (!first && !(entries.back().value < entry.value)) return;
    if (!limits_.costs.empty() && entry.cost > most_left_[layer]) return;
    // Whatever is left of the budget here, both fit: the better one is enough.
    const bool both_fit =
        !first && (entries.back().cost == entry.cost || (!limits_.costs.empty() && entry.cost <= least_left_[layer]));
    if (both_fit) {
      entries.back() = entry;
    } else {
      entries.push_back(entry);
    }
  }

  static void close_state(Layer& layer) { layer.starts.push_back(layer.entries.size()); }

  static const Entry* best_within(Span front, int64_t budget) {
    const Entry* after = std::upper_bound(front.begin, front.end, budget,
                                          [](int64_t cost, const Entry& entry) { return cost < entry.cost; });
    return after == front.begin ? nullptr : after - 1;
  }

  std::optional<Selection> read_off() const {
    int64_t budget = limits_.costs.empty() ? 0 : limits_.cost_limit;
    const Entry* best = best_within(front(0, 0, 0), budget);
    if (best == nullptr) return std::nullopt;
    Selection selection{std::vector<bool>(limits_.layers, false), best->value};
    int count = 0, run = 0;
    for (int layer = 0; layer < limits_.layers; ++layer) {
      const Entry* keeps = best_within(next(layer, count, run, true), budget - cost(layer));
      const bool retrieval = keeps != nullptr && keeps->value + gain(layer, count, true) == best->value;
      selection.retrieval[layer] = retrieval;
      best = retrieval ? keeps : best_within(next(layer, count, run, false), budget);
      budget -= retrieval ? cost(layer) : 0;
      count += retrieval && counted_ ? 1 : 0;
      run = run_after(run, retrieval);
    }
    return selection;
  }

  const Goal& goal_;
  const Limits& limits_;
  const bool counted_;
  const int run_states_;  // streaming runs told apart: 0..max_streaming_run, or one where they do not matter
  std::vector<int> least_, most_;
  std::vector<int64_t> least_left_, most_left_;
  std::vector<Layer> layers_;
  std::size_t entries_ = 0;
};

bool better(const Selection& a, const Selection& b) {
  return b.value < a.value || (a.value == b.value && b.retrieval < a.retrieval);
}

// Equal numbers in every stage are a count per stage: where the number of retrieval layers is open, each is tried.
std::optional<Selection> select_sum(const Goal& goal, const Limits& limits) {
  if (limits.count || limits.stages.size() <= 1) return Program(goal, limits).solve();
  std::optional<Selection> best;
  Limits counted = limits;
  for (int count = 0; count <= limits.layers; count += static_cast<int>(limits.stages.size())) {
    counted.count = count;
    std::optional<Selection> selection = Program(goal, counted).solve();
    if (selection && (!best || better(*selection, *best))) best = std::move(selection);
  }
  return best;
}

}  // namespace

std::optional<Selection> select(const Goal& goal, const Limits& limits) {
  if (goal.exposures.empty()) return select_sum(goal, limits);
  // Forcing every layer above a bound to retrieve can only rule choices out, so the least bound is found by bisection.
  std::vector<int64_t> bounds = goal.exposures;
  bounds.push_back(0);
  std::sort(bounds.begin(), bounds.end());
  bounds.erase(std::unique(bounds.begin(), bounds.end()), bounds.end());
  std::optional<Selection> best;
  for (std::size_t low = 0, high = bounds.size(); low < high;) {
    const std::size_t middle = best ? low + (high - low) / 2 : high - 1;  // first the bound that rules nothing out
    Limits bounded = limits;
    for (int layer = 0; layer < limits.layers; ++layer) {
      if (goal.exposures[layer] > bounds[middle]) bounded.retrieval[layer] = true;
    }
    std::optional<Selection> selection = select_sum(goal, bounded);
    if (selection) {
      best = std::move(selection);
      high = middle;
    } else {
      if (!best) return std::nullopt;
      low = middle + 1;
    }
  }
  for (int layer = 0; layer < limits.layers; ++layer) {
    if (!best->retrieval[layer]) best->exposure = std::max(best->exposure, goal.exposures[layer]);
  }
  return best;
}

}  // namespace zigzag::solver
