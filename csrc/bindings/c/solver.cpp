#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include "bindings/c/bindings.h"
#include "solver/solve.h"

namespace py = pybind11;

namespace zigzag::bindings {
namespace {

using ScoreArray = py::array_t<double, py::array::c_style | py::array::forcecast>;

Solution solve_array(const ScoreArray& scores, double retrieval_ratio, const std::string& objective) {
  ZZ_CHECK(scores.ndim() == 2, "scores must be a [layers, kv_heads] matrix, got an array with ", scores.ndim(),
           " dimensions");
  const ScoreMatrix matrix{scores.data(), static_cast<int>(scores.shape(0)), static_cast<int>(scores.shape(1))};
  return solve(matrix, retrieval_ratio, objective);
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
      .def_readonly("layer_values", &Solution::layer_values);
  module.def("solve", &solve_array, py::arg("scores"), py::arg("retrieval_ratio"), py::arg("objective"),
             "Picks the retrieval layers from scores [layers, kv_heads] in [0, 1].");
  module.def("objectives", &objective_descriptions, "Every objective of the solver: name -> one-line description.");
}

}  // namespace zigzag::bindings
