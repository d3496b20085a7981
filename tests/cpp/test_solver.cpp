// The solver against brute force over every choice of K layers, exact counts, tie rule, and refused input.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "core/error.h"
#include "solver/solve.h"

namespace {

using namespace zigzag;

struct Scores {
  std::vector<double> values;
  int layers, kv_heads;
  ScoreMatrix view() const { return {values.data(), layers, kv_heads}; }
};

// Scores on `levels` equally spaced values: few levels make many ties. levels is a power of two, so sums are exact.
Scores random_scores(std::mt19937& random, int layers, int kv_heads, int levels) {
  std::uniform_int_distribution<int> level(0, levels);
  Scores scores{{}, layers, kv_heads};
  for (int i = 0; i < layers * kv_heads; ++i) scores.values.push_back(static_cast<double>(level(random)) / levels);
  return scores;
}

Solution solve_ratio(const ScoreMatrix& scores, double ratio, const std::string& objective) {
  SolveOptions options;
  options.objective = objective;
  options.retrieval_layers = count_retrieval_layers(ratio, scores.layers);
  return solve(scores, options);
}

std::vector<bool> retrieval_mask(const Solution& solution) {
  std::vector<bool> mask;
  for (LayerKind kind : solution.kinds) mask.push_back(kind == LayerKind::kRetrieval);
  return mask;
}

int count(const std::vector<bool>& mask) {
  int total = 0;
  for (bool set : mask) total += set;
  return total;
}

double retained_sum(const Scores& scores, const std::vector<bool>& mask) {
  double sum = 0;
  for (int i = 0; i < scores.layers * scores.kv_heads; ++i) {
    if (mask[i / scores.kv_heads]) sum += scores.values[i];
  }
  return sum;
}

double distance(const Scores& scores, const std::vector<bool>& mask, int power) {
  double sum = 0;
  for (int i = 0; i < scores.layers * scores.kv_heads; ++i) {
    sum += std::pow(std::abs((mask[i / scores.kv_heads] ? 1.0 : 0.0) - scores.values[i]), power);
  }
  return sum;
}

double distance_from_even(const std::vector<bool>& mask) {
  const double layers = static_cast<double>(mask.size()), target = count(mask);
  double sum = 0;
  int so_far = 0;
  for (std::size_t layer = 0; layer < mask.size(); ++layer) {
    so_far += mask[layer];
    sum += std::abs(target * static_cast<double>(layer + 1) / layers - so_far);
  }
  return sum;
}

// All masks of `layers` with `retrieval` bits set; the one that prefers lower layers comes first.
std::vector<std::vector<bool>> all_choices(int layers, int retrieval) {
  std::vector<std::vector<bool>> choices;
  std::vector<bool> mask(layers, false);
  std::fill(mask.begin(), mask.begin() + retrieval, true);
  do {
    choices.push_back(mask);
  } while (std::prev_permutation(mask.begin(), mask.end()));
  return choices;
}

// The first of the best choices: what the tie rule promises.
template <class Cost>
std::vector<bool> brute_force(int layers, int retrieval, Cost&& cost) {
  std::vector<bool> best;
  double least = std::numeric_limits<double>::infinity();
  for (const std::vector<bool>& mask : all_choices(layers, retrieval)) {
    const double here = cost(mask);
    if (here < least - 1e-9) {
      least = here;
      best = mask;
    }
  }
  return best;
}

std::string error_of(const Scores& scores, double ratio, const std::string& objective) {
  try {
    solve_ratio(scores.view(), ratio, objective);
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

}  // namespace

TEST_CASE("mean: equals brute force in retained score and in L1 and L2 distance, ties to the lower layers") {
  std::mt19937 random(7);
  for (int layers = 1; layers <= 10; ++layers) {
    for (int levels : {1, 2, 1 << 16}) {
      const Scores scores = random_scores(random, layers, 1 + layers % 4, levels);
      for (int k = 0; k <= layers; ++k) {
        const std::vector<bool> mask =
            retrieval_mask(solve_ratio(scores.view(), static_cast<double>(k) / layers, "mean"));
        CAPTURE(layers);
        CAPTURE(levels);
        CAPTURE(k);
        CHECK(mask == brute_force(layers, k, [&](const std::vector<bool>& m) { return -retained_sum(scores, m); }));
        CHECK(mask == brute_force(layers, k, [&](const std::vector<bool>& m) { return distance(scores, m, 1); }));
        CHECK(mask == brute_force(layers, k, [&](const std::vector<bool>& m) { return distance(scores, m, 2); }));
      }
    }
  }
}

TEST_CASE("even: equals brute force in the distance from an even spread, whatever the scores") {
  std::mt19937 random(8);
  for (int layers = 1; layers <= 12; ++layers) {
    for (int k = 0; k <= layers; ++k) {
      const Solution solution =
          solve_ratio(random_scores(random, layers, 2, 1024).view(), static_cast<double>(k) / layers, "even");
      const std::vector<bool> mask = retrieval_mask(solution);
      CAPTURE(layers);
      CAPTURE(k);
      CHECK(mask == brute_force(layers, k, distance_from_even));
      CHECK(solution.objective_value == doctest::Approx(distance_from_even(mask)));
    }
  }
}

TEST_CASE("solve: reports what it chose") {
  const Scores scores{{0.5, 1.0, 0.0, 0.25, 0.25, 0.0}, 3, 2};
  const Solution solution = solve_ratio(scores.view(), 1.0 / 3, "mean");
  CHECK(solution.kinds == std::vector<LayerKind>{LayerKind::kRetrieval, LayerKind::kStreaming, LayerKind::kStreaming});
  CHECK(solution.objective_value == 0.75);
  CHECK(solution.retained_score == 0.75);
  CHECK(solution.layer_values == std::vector<double>{0.75, 0.125, 0.125});
  const Solution even = solve_ratio(scores.view(), 1.0, "even");
  CHECK(even.retained_score == 1.0);
  CHECK(even.objective_value == 0.0);
  const Scores zeros{std::vector<double>(6, 0.0), 3, 2};
  CHECK(solve_ratio(zeros.view(), 0.5, "mean").retained_score == 1.0);
}

TEST_CASE("solve: every objective keeps exactly the rounded number of layers, halves up") {
  std::mt19937 random(9);
  CHECK(count_retrieval_layers(0.5, 5) == 3);
  CHECK(count_retrieval_layers(0.5, 3) == 2);
  CHECK(count_retrieval_layers(0.25, 10) == 3);
  CHECK(count_retrieval_layers(std::nextafter(0.5, 0.0), 1) == 0);
  for (const ObjectiveInfo& objective : objectives()) {
    CHECK(!objective.description.empty());
    for (int layers : {1, 2, 7, 32, 126}) {
      const Scores scores = random_scores(random, layers, 8, 4);
      for (double ratio = 0.0; ratio <= 1.0; ratio += 1.0 / 64) {
        const Solution solution = solve_ratio(scores.view(), ratio, objective.name);
        CHECK(count(retrieval_mask(solution)) == static_cast<int>(std::floor(ratio * layers + 0.5)));
        CHECK(solution.kinds.size() == static_cast<std::size_t>(layers));
        CHECK(solution.layer_values.size() == static_cast<std::size_t>(layers));
      }
    }
  }
}

TEST_CASE("mean: a larger budget only adds layers") {
  std::mt19937 random(10);
  const Scores scores = random_scores(random, 40, 8, 16);
  std::vector<bool> smaller(40, false);
  for (int k = 0; k <= 40; ++k) {
    const std::vector<bool> mask = retrieval_mask(solve_ratio(scores.view(), k / 40.0, "mean"));
    for (int layer = 0; layer < 40; ++layer) CHECK((!smaller[layer] || mask[layer]));
    smaller = mask;
  }
}

TEST_CASE("solve: refuses bad input and says why") {
  const double nan = std::numeric_limits<double>::quiet_NaN(), inf = std::numeric_limits<double>::infinity();
  const Scores good{{0.1, 0.2, 0.3, 0.4}, 2, 2};
  struct Case {
    Scores scores;
    double ratio;
    const char* objective;
    const char* mention;
  };
  const std::vector<Case> cases = {
      {{{0.1, nan, 0.3, 0.4}, 2, 2}, 0.5, "mean", "got nan at layer 0, KV head 1"},
      {{{0.1, 0.2, inf, 0.4}, 2, 2}, 0.5, "even", "got inf at layer 1, KV head 0"},
      {{{0.1, 0.2, 0.3, 1.5}, 2, 2}, 0.5, "mean", "got 1.5 at layer 1, KV head 1"},
      {{{-0.25, 0.2, 0.3, 0.4}, 2, 2}, 0.5, "mean", "got -0.25 at layer 0, KV head 0"},
      {{{}, 0, 2}, 0.5, "mean", "[0, 2]"},
      {{{}, 2, 0}, 0.5, "mean", "[2, 0]"},
      {good, -0.1, "mean", "retrieval_ratio must lie in [0, 1], got -0.1"},
      {good, 1.1, "mean", "got 1.1"},
      {good, nan, "even", "got nan"},
      {good, 0.5, "median", "unknown objective \"median\"; known: mean, count"},
      {good, 0.5, "", "unknown objective \"\""},
  };
  for (const Case& c : cases) {
    CAPTURE(c.mention);
    const std::string message = error_of(c.scores, c.ratio, c.objective);
    CAPTURE(message);
    CHECK(message.find(c.mention) != std::string::npos);
  }
}
