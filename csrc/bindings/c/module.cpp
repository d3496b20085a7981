// Entry of zigzag_ext._C. Every zigzag::Error reaches Python as a ValueError with the same text, OutOfMemory as a
// MemoryError.
#include "bindings/c/bindings.h"
#include "core/error.h"
#include "kv/virtual_buffer.h"

PYBIND11_MODULE(_C, module) {
  namespace bindings = zigzag::bindings;
  module.doc() = "Plans, the layer solver, the scheduler and growing memory of zigzag_ext, without torch.";
  pybind11::register_local_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const zigzag::OutOfMemory& error) {
      pybind11::set_error(PyExc_MemoryError, error.what());
    } catch (const zigzag::Error& error) {
      pybind11::set_error(PyExc_ValueError, error.what());
    }
  });
  bindings::bind_build_info(module);
  bindings::bind_decode_plan(module);
  bindings::bind_limits(module);
  bindings::bind_plan(module);
  bindings::bind_prefill_plan(module);
  bindings::bind_scheduler(module);
  bindings::bind_solver(module);
  bindings::bind_virtual_buffer(module);
}
