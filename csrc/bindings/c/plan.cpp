#include "bindings/c/kinds.h"

namespace py = pybind11;

namespace zigzag::bindings {
namespace {

void check_plan(const KindNames& kinds, int64_t sink, int64_t window) { LayerPlan(parse_kinds(kinds), sink, window); }

}  // namespace

void bind_plan(py::module_& module) {
  module.def("check_plan", &check_plan, py::arg("kinds"), py::arg("sink"), py::arg("window"),
             "Raises ValueError unless kinds, sink and window make a valid plan.");
}

}  // namespace zigzag::bindings
