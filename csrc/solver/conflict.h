// Why no choice of layers is allowed.
#pragma once

#include <string>

#include "solver/select.h"
#include "solver/solve.h"

namespace zigzag::solver {

// One sentence for limits that admit no choice: a smallest set of constraints that conflict, and what would be
// possible.
std::string explain_conflict(const Limits& limits, const SolveOptions& options);

}  // namespace zigzag::solver
