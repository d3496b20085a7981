// Growing memory for Python. zigzag_ext/attention/buffers.py makes tensors of it, through the buffer protocol on the
// CPU and
// __cuda_array_interface__ on CUDA: neither needs torch here, and both keep the buffer alive.
#include "kv/virtual_buffer.h"

#include <pybind11/stl.h>

#include <optional>

#include "bindings/c/bindings.h"

namespace py = pybind11;

namespace zigzag::bindings {
namespace {

std::unique_ptr<AddressSpace> address_space(std::optional<int> device) {
  return device ? device_address_space(*device) : host_address_space();
}

struct PyVirtualBuffer {
  PyVirtualBuffer(int64_t rows, int64_t row_bytes, std::optional<int> cuda_device, int64_t unit_bytes)
      : device(cuda_device),
        memory(std::make_unique<VirtualBuffer>(address_space(cuda_device), rows, row_bytes, unit_bytes)) {}
  PyVirtualBuffer(PyVirtualBuffer& from, int64_t row_bytes)
      : device(from.device),
        memory(std::make_unique<VirtualBuffer>(address_space(from.device), row_bytes, *from.memory)) {}
  // Python drops the last reference with the interpreter's lock held, and giving memory back waits for the device.
  ~PyVirtualBuffer() {
    const py::gil_scoped_release others_run;
    memory.reset();
  }

  std::optional<int> device;
  std::unique_ptr<VirtualBuffer> memory;
};

// A method of VirtualBuffer for Python, without the interpreter's lock.
template <class Result, class... Args>
auto unlocked(Result (VirtualBuffer::*method)(Args...)) {
  return [method](PyVirtualBuffer& buffer, Args... args) {
    const py::gil_scoped_release others_run;
    return (buffer.memory.get()->*method)(args...);
  };
}

template <class Result, class... Args>
auto unlocked(Result (VirtualBuffer::*method)(Args...) const) {
  return [method](const PyVirtualBuffer& buffer, Args... args) {
    const py::gil_scoped_release others_run;
    return (buffer.memory.get()->*method)(args...);
  };
}

py::buffer_info bytes_of(PyVirtualBuffer& buffer) {
  if (buffer.device) throw py::buffer_error("the buffer is on a GPU: it has __cuda_array_interface__ instead");
  return py::buffer_info(reinterpret_cast<uint8_t*>(buffer.memory->data()), buffer.memory->reserved_bytes());
}

// https://nvidia.github.io/numba-cuda/user/cuda_array_interface.html, version 3.
py::dict cuda_array_interface(const PyVirtualBuffer& buffer) {
  if (!buffer.device) throw py::attribute_error("the buffer is on the CPU: it has the buffer protocol instead");
  py::dict interface;
  interface["shape"] = py::make_tuple(buffer.memory->reserved_bytes());
  interface["typestr"] = "|u1";
  interface["data"] = py::make_tuple(reinterpret_cast<uintptr_t>(buffer.memory->data()), false);
  interface["version"] = 3;
  return interface;
}

std::string repr(const PyVirtualBuffer& buffer) {
  const VirtualBuffer& memory = *buffer.memory;
  return concat("VirtualBuffer(", memory.rows(), " rows of ", memory.row_bytes(), " bytes on ",
                buffer.device ? concat("cuda:", *buffer.device) : "cpu", ", ", memory.committed_bytes(), " of ",
                memory.reserved_bytes(), " bytes committed)");
}

void watch_streams(int device, const std::vector<uintptr_t>& streams) {
  std::vector<void*> handles;
  for (const uintptr_t stream : streams) handles.push_back(reinterpret_cast<void*>(stream));
  watch_captures(device, handles);
}

}  // namespace

void bind_virtual_buffer(py::module_& module) {
  const auto number = [](auto method) {
    return [method](const PyVirtualBuffer& buffer) { return (buffer.memory.get()->*method)(); };
  };
  py::class_<PyVirtualBuffer>(
      module, "VirtualBuffer", py::buffer_protocol(),
      "Rows of memory that grow without moving, for several threads. What is not committed must "
      "not be touched on CUDA; on the CPU it reads as zeros and must not be written.")
      .def(py::init<int64_t, int64_t, std::optional<int>, int64_t>(), py::arg("rows"), py::arg("row_bytes"),
           py::arg("device") = py::none(), py::arg("unit_bytes") = 1, py::call_guard<py::gil_scoped_release>(),
           "Reserves addresses and no memory, on a CUDA device or (None) on the CPU.")
      .def_buffer(&bytes_of)
      .def_property_readonly("__cuda_array_interface__", &cuda_array_interface)
      .def("commit", unlocked(&VirtualBuffer::commit), py::arg("row_bytes"),
           "Makes the first row_bytes of every row usable. MemoryError leaves the buffer as it was.")
      .def("commit_row", unlocked(&VirtualBuffer::commit_row), py::arg("row"), py::arg("row_bytes"))
      .def("growth", unlocked(&VirtualBuffer::growth), py::arg("row_bytes"), "Bytes of memory that commit would take.")
      .def("row_growth", unlocked(&VirtualBuffer::row_growth), py::arg("row"), py::arg("row_bytes"))
      .def("shrink", unlocked(&VirtualBuffer::shrink), py::arg("row_bytes"),
           "Waits for the device and gives back the pages behind the first row_bytes of every row; the addresses stay. "
           "During a stream capture it keeps them.")
      .def("shrink_row", unlocked(&VirtualBuffer::shrink_row), py::arg("row"), py::arg("row_bytes"))
      .def("release", unlocked(&VirtualBuffer::release), "shrink(0).")
      .def(
          "extended",
          [](PyVirtualBuffer& buffer, int64_t row_bytes) {
            return std::make_unique<PyVirtualBuffer>(buffer, row_bytes);
          },
          py::arg("row_bytes"), py::call_guard<py::gil_scoped_release>(),
          "Another one with longer rows and the same contents: on CUDA the same memory, so release this one.")
      .def("committed_row_bytes", unlocked(&VirtualBuffer::committed_row_bytes), py::arg("row"))
      .def_property_readonly("data_ptr",
                             [](const PyVirtualBuffer& b) { return reinterpret_cast<uintptr_t>(b.memory->data()); })
      .def_readonly("device", &PyVirtualBuffer::device)
      .def_property_readonly("rows", number(&VirtualBuffer::rows))
      .def_property_readonly("row_bytes", number(&VirtualBuffer::row_bytes))
      .def_property_readonly("row_stride", number(&VirtualBuffer::row_stride))
      .def_property_readonly("page_bytes", number(&VirtualBuffer::page_bytes))
      .def_property_readonly("reserved_bytes", number(&VirtualBuffer::reserved_bytes))
      .def_property_readonly("committed_bytes", number(&VirtualBuffer::committed_bytes))
      .def("__repr__", &repr);
  module.def("host_free_bytes", &host_free_bytes, py::arg("root") = "",
             "Bytes that this process can still take without swapping: by /proc/meminfo and the memory limits of its "
             "control groups, read under `root`.");
  module.def("watch_captures", &watch_streams, py::arg("device"), py::arg("streams"),
             "Streams (cudaStream_t) of a device, alive to the end of the process, that may capture while memory is "
             "given back.");
}

}  // namespace zigzag::bindings
