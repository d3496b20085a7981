#include "solver/solve.h"

#include <cmath>

#include "solver/objectives.h"

namespace zigzag {
namespace {

void check_scores(const ScoreMatrix& scores) {
  ZZ_CHECK(scores.layers >= 1 && scores.kv_heads >= 1, "scores must have at least one layer and one KV head, got [",
           scores.layers, ", ", scores.kv_heads, "]");
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

Solution solve(const ScoreMatrix& scores, double retrieval_ratio, const std::string& objective) {
  const solver::Objective& chosen = find_objective(objective);
  check_scores(scores);
  solver::Choice choice = chosen.choose({scores, count_retrieval_layers(retrieval_ratio, scores.layers)});
  Solution solution{{}, choice.value, retained_share(scores, choice.retrieval), std::move(choice.layer_values)};
  for (const bool retrieval : choice.retrieval) {
    solution.kinds.push_back(retrieval ? LayerKind::kRetrieval : LayerKind::kStreaming);
  }
  return solution;
}

}  // namespace zigzag
