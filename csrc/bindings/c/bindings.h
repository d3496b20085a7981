// The pieces of the Python module zigzag_ext._C, one file each. Torch-free; typed for Python in zigzag_ext/_C.pyi.
#pragma once

#include <pybind11/pybind11.h>

namespace zigzag::bindings {

void bind_build_info(pybind11::module_& module);
void bind_decode_plan(pybind11::module_& module);
void bind_limits(pybind11::module_& module);
void bind_plan(pybind11::module_& module);
void bind_prefill_plan(pybind11::module_& module);
void bind_scheduler(pybind11::module_& module);
void bind_solver(pybind11::module_& module);
void bind_virtual_buffer(pybind11::module_& module);

}  // namespace zigzag::bindings
