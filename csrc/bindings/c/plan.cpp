#include "bindings/c/kinds.h"

namespace py = pybind11;

namespace zigzag::bindings {
namespace {

void check_plan(const KindNames& kinds, int64_t sink, int64_t window, const LayerSizes& sizes) {
  make_plan(kinds, sink, window, sizes);
}

}  // namespace

void bind_plan(py::module_& module) {
  module.def("check_plan", &check_plan, py::arg("kinds"), py::arg("sink"), py::arg("window"),
             py::arg("layer_sizes") = LayerSizes(),
             "Raises ValueError unless kinds, sink, window and the sizes of layers make a valid plan.");
}

}  // namespace zigzag::bindings
