// The shapes that have a kernel, so that Python never repeats the lists of core/types.h.
#include <cstddef>

#include "bindings/c/bindings.h"
#include "kernels/attention.h"

namespace py = pybind11;

namespace zigzag::bindings {

namespace {

py::dict formats() {
  py::dict all;
  for (const KvFormat format : kKvFormats) {
    const KvFormatInfo table = info(format);
    py::dict entry;
    entry["bits"] = table.bits;
    entry["code_dtype"] = table.code_dtype;
    entry["scale_bytes"] = table.scale_bytes;
    all[table.name] = entry;
  }
  return all;
}

template <std::size_t kCount>
py::tuple as_tuple(const int (&numbers)[kCount]) {
  py::tuple all(kCount);
  for (std::size_t i = 0; i < kCount; ++i) all[i] = numbers[i];
  return all;
}

}  // namespace

void bind_limits(py::module_& module) {
  module.attr("HEAD_DIMS") = as_tuple(kHeadDims);
  module.attr("MAX_GROUP_SIZE") = kMaxGroupSize;
  module.attr("MAX_DECODE_QUERIES") = kMaxDecodeQueries;
  module.def(
      "formats", &formats,
      "The formats of a key or value cache by name: bits of a code and the torch dtype that holds codes (0 and \"\" "
      "where elements are of the model's dtype), and bytes of the scale of a vector.");
  module.attr("WORKSPACE_BYTES") = attention_workspace_bytes();
  module.def("readable_slots", &readable_slots, py::arg("length"), py::arg("batch"), py::arg("num_kv_heads"),
             "Slots of a full cache on CUDA that need memory for rows that hold `length` tokens after a call.");
}

}  // namespace zigzag::bindings
