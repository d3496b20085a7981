#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <limits>
#include <utility>
#include <vector>

#include "bindings/c/bindings.h"
#include "solver/solve.h"

namespace py = pybind11;

namespace zigzag::bindings {
namespace {

using ScoreArray = py::array_t<double, py::array::c_style | py::array::forcecast>;

// Copies both arguments: other Python threads run during the search, and may write to them.
Solution solve_array(const ScoreArray& scores, SolveOptions options) {
  ZZ_CHECK(scores.ndim() == 2, "scores must be a [layers, kv_heads] matrix, got an array with ", scores.ndim(),
           " dimensions");
  constexpr py::ssize_t kMost = std::numeric_limits<int>::max();
  ZZ_CHECK(scores.shape(0) <= kMost && scores.shape(1) <= kMost,
           "scores may have at most 2^31 - 1 layers and KV heads, got ", scores.shape(0), " x ", scores.shape(1));
  const std::vector<double> values(scores.data(), scores.data() + scores.size());
  const ScoreMatrix matrix{values.data(), static_cast<int>(scores.shape(0)), static_cast<int>(scores.shape(1))};
  const py::gil_scoped_release others_run;
  return solve(matrix, options);
}

CostBudget cost_budget(std::string name, std::vector<int64_t> retrieval, std::vector<int64_t> streaming, int64_t limit,
                       double unit) {
  return {std::move(name), std::move(retrieval), std::move(streaming), limit, unit};
}

std::vector<std::string> kind_names(const Solution& solution) {
  std::vector<std::string> names;
  for (const LayerKind kind : solution.kinds) names.emplace_back(name(kind));
  return names;
}

py::dict objective_descriptions() {
  py::dict descriptions;
  for (const ObjectiveInfo& info : objectives()) descriptions[py::str(info.name)] = info.description;
  return descriptions;
}

}  // namespace

void bind_solver(py::module_& module) {
  py::class_<Solution>(module, "Solution", "A kind for every layer, and how the objective rates the choice.")
      .def_property_readonly("kinds", &kind_names)
      .def_readonly("objective_value", &Solution::objective_value)
      .def_readonly("retained_score", &Solution::retained_score)
      .def_readonly("layer_values", &Solution::layer_values)
      .def_readonly("mask_distance", &Solution::mask_distance)
      .def_readonly("mask_heads", &Solution::mask_heads);
  py::class_<CostBudget>(module, "CostBudget", "What the layers of a plan may cost together, in integer units.")
      .def(py::init(&cost_budget), py::arg("name"), py::arg("retrieval"), py::arg("streaming"), py::arg("limit"),
           py::arg("unit"));
  py::class_<SolveOptions>(module, "SolveOptions", "Objective, budget and constraints; see zigzag_ext.solve.")
      .def(py::init<>())
      .def_readwrite("objective", &SolveOptions::objective)
      .def_readwrite("retrieval_layers", &SolveOptions::retrieval_layers)
      .def_readwrite("costs", &SolveOptions::costs)
      .def_readwrite("force_retrieval", &SolveOptions::force_retrieval)
      .def_readwrite("force_streaming", &SolveOptions::force_streaming)
      .def_readwrite("max_streaming_run", &SolveOptions::max_streaming_run)
      .def_readwrite("stages", &SolveOptions::stages)
      .def_readwrite("threshold", &SolveOptions::threshold)
      .def_readwrite("sparsity", &SolveOptions::sparsity)
      .def_readwrite("top_heads", &SolveOptions::top_heads)
      .def_readwrite("values", &SolveOptions::values);
  module.def("solve", &solve_array, py::arg("scores"), py::arg("options"),
             "Picks the retrieval layers from scores [layers, kv_heads] in [0, 1].");
  module.def("count_retrieval_layers", &count_retrieval_layers, py::arg("retrieval_ratio"), py::arg("layers"),
             "retrieval_ratio * layers, rounded to the nearest integer, halves up.");
  module.def("objectives", &objective_descriptions, "Every objective of the solver: name -> one-line description.");
}

}  // namespace zigzag::bindings
