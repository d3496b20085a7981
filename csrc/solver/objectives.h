// What an objective is to the solver. To add one: write its function in objectives.cpp and enter it in the table there.
#pragma once

#include <vector>

#include "solver/solve.h"

namespace zigzag::solver {

// A checked problem: scores are in [0, 1], there is at least one layer and 0 <= retrieval_layers <= layers.
struct Problem {
  ScoreMatrix scores;
  int retrieval_layers;
};

struct Choice {
  std::vector<bool> retrieval;       // [layers], exactly Problem::retrieval_layers of them true
  double value;                      // of the choice, as the objective counts it
  std::vector<double> layer_values;  // [layers], see Solution
};

struct Objective {
  const char* name;
  const char* description;
  Choice (*choose)(const Problem&);
};

const std::vector<Objective>& registry();

}  // namespace zigzag::solver
