// What an objective is to the solver. To add one: write its function in objectives.cpp and enter it in the table there.
#pragma once

#include <cstdint>
#include <vector>

#include "solver/select.h"
#include "solver/solve.h"

namespace zigzag::solver {

// A checked problem: scores are in [0, 1], options are complete and consistent.
struct Problem {
  const ScoreMatrix& scores;
  const SolveOptions& options;
  int retrieval_layers;  // exactly so many, or -1: any number that the budget allows (never for fixed_count objectives)
};

// The goal of the search, and how to report the choice.
struct Rating {
  Goal goal;
  std::vector<double> layer_values;  // [layers], see Solution
  double unit = 1.0;                 // Solution::objective_value = offset + unit * Value::first, or unit * exposure
  double offset = 0.0;
};

struct Objective {
  const char* name;
  const char* description;
  bool fixed_count;    // it compares choices of one size only
  const char* option;  // the member of SolveOptions that is its own, or nullptr
  Rating (*rate)(const Problem&);
};

const std::vector<Objective>& registry();

}  // namespace zigzag::solver
