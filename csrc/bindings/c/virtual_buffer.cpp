// Growing memory for Python. zigzag_ext/virtual.py makes tensors of it, through the buffer protocol on the CPU and
// __cuda_array_interface__ on CUDA: neither needs torch here, and both keep the buffer alive.
#include "kv/virtual_buffer.h"

#include <pybind11/stl.h>

#include <optional>

#include "bindings/c/bindings.h"

namespace py = pybind11;

namespace zigzag::bindings {
namespace {

struct PyVirtualBuffer : VirtualBuffer {
  PyVirtualBuffer(int64_t rows, int64_t row_bytes, std::optional<int> cuda_device, int64_t unit_bytes)
      : VirtualBuffer(cuda_device ? device_address_space(*cuda_device) : host_address_space(), rows, row_bytes,
                      unit_bytes),
        device(cuda_device) {}
  std::optional<int> device;
};

py::buffer_info bytes_of(PyVirtualBuffer& buffer) {
  if (buffer.device) throw py::buffer_error("the buffer is on a GPU: it has __cuda_array_interface__ instead");
  return py::buffer_info(reinterpret_cast<uint8_t*>(buffer.data()), buffer.reserved_bytes());
}

// https://nvidia.github.io/numba-cuda/user/cuda_array_interface.html, version 3.
py::dict cuda_array_interface(const PyVirtualBuffer& buffer) {
  if (!buffer.device) throw py::attribute_error("the buffer is on the CPU: it has the buffer protocol instead");
  py::dict interface;
  interface["shape"] = py::make_tuple(buffer.reserved_bytes());
  interface["typestr"] = "|u1";
  interface["data"] = py::make_tuple(reinterpret_cast<uintptr_t>(buffer.data()), false);
  interface["version"] = 3;
  return interface;
}

std::string repr(const PyVirtualBuffer& buffer) {
  return concat("VirtualBuffer(", buffer.rows(), " rows of ", buffer.row_bytes(), " bytes on ",
                buffer.device ? concat("cuda:", *buffer.device) : "cpu", ", ", buffer.committed_bytes(), " of ",
                buffer.reserved_bytes(), " bytes committed)");
}

}  // namespace

void bind_virtual_buffer(py::module_& module) {
  py::class_<PyVirtualBuffer>(module, "VirtualBuffer", py::buffer_protocol(),
                              "Rows of memory that grow without moving. Touching what is not committed crashes.")
      .def(py::init<int64_t, int64_t, std::optional<int>, int64_t>(), py::arg("rows"), py::arg("row_bytes"),
           py::arg("device") = py::none(), py::arg("unit_bytes") = 1,
           "Reserves addresses and no memory, on a CUDA device or (None) on the CPU.")
      .def_buffer(&bytes_of)
      .def_property_readonly("__cuda_array_interface__", &cuda_array_interface)
      .def("commit", &PyVirtualBuffer::commit, py::arg("row_bytes"), py::call_guard<py::gil_scoped_release>(),
           "Makes the first row_bytes of every row usable. MemoryError leaves the buffer as it was.")
      .def("release", &PyVirtualBuffer::release, py::call_guard<py::gil_scoped_release>(),
           "Waits for the device and gives all memory back; the addresses stay.")
      .def_property_readonly("data_ptr", [](const PyVirtualBuffer& b) { return reinterpret_cast<uintptr_t>(b.data()); })
      .def_readonly("device", &PyVirtualBuffer::device)
      .def_property_readonly("rows", &PyVirtualBuffer::rows)
      .def_property_readonly("row_bytes", &PyVirtualBuffer::row_bytes)
      .def_property_readonly("row_stride", &PyVirtualBuffer::row_stride)
      .def_property_readonly("page_bytes", &PyVirtualBuffer::page_bytes)
      .def_property_readonly("reserved_bytes", &PyVirtualBuffer::reserved_bytes)
      .def_property_readonly("committed_bytes", &PyVirtualBuffer::committed_bytes)
      .def_property_readonly("committed_row_bytes", &PyVirtualBuffer::committed_row_bytes)
      .def("__repr__", &repr);
}

}  // namespace zigzag::bindings
