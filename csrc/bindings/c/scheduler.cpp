// The scheduler's tables for Python: kernels, slots and bytes. Python launches through the torch ops, C++ through
// Scheduler.
#include "engine/scheduler.h"

#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <utility>

#include "bindings/c/bindings.h"

namespace py = pybind11;

namespace zigzag::bindings {
namespace {

DType parse_dtype(const std::string& given) {
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    if (given == name(dtype)) return dtype;
  }
  throw Error(concat("dtype \"", given, "\" is not supported; supported: float32, float16, bfloat16"));
}

KvFormat parse_kv_format(const std::string& given) {
  for (const KvFormat format : {KvFormat::kPlain, KvFormat::kFp8, KvFormat::kInt8, KvFormat::kInt4}) {
    if (given == name(format)) return format;
  }
  throw Error(concat("KV format \"", given, "\" is not supported; supported: none, fp8, int8, int4"));
}

using FormatNames = std::pair<std::string, std::string>;  // of keys, of values

Scheduler make_scheduler(const std::vector<std::string>& kinds, int64_t sink, int64_t window, int num_q_heads,
                         int num_kv_heads, int head_dim, const std::string& dtype, const FormatNames& kv_format,
                         const FormatNames& ring_kv_format) {
  const auto formats = [](const FormatNames& names) {
    return KvFormats{parse_kv_format(names.first), parse_kv_format(names.second)};
  };
  return Scheduler(LayerPlan(parse_layer_kinds(kinds), sink, window),
                   ModelGeometry{num_q_heads, num_kv_heads, head_dim, parse_dtype(dtype), formats(kv_format),
                                 formats(ring_kv_format)});
}

const char* kernel_name(const Scheduler& scheduler, int layer, int q_len) {
  ZZ_CHECK(q_len >= 1, "q_len must be >= 1, got ", q_len);
  return name(scheduler.layer(layer).kernel(q_len));
}

int64_t slots(const Scheduler& scheduler, int layer, int64_t max_len) {
  ZZ_CHECK(max_len >= 0, "max_len must be >= 0, got ", max_len);
  return scheduler.layer(layer).slots(max_len);
}

int64_t kv_bytes(const Scheduler& scheduler, int64_t batch, int64_t max_len, const std::optional<std::string>& kind) {
  const KvBytes bytes = scheduler.kv_bytes(batch, max_len);
  if (!kind) return bytes.total();
  return parse_layer_kinds({*kind})[0] == LayerKind::kRetrieval ? bytes.retrieval : bytes.streaming;
}

std::string repr(const Scheduler& scheduler) {
  int retrieval = 0;
  for (int layer = 0; layer < scheduler.num_layers(); ++layer) {
    retrieval += scheduler.layer(layer).kind == LayerKind::kRetrieval;
  }
  const ModelGeometry& geometry = scheduler.geometry();
  return concat("Scheduler(", scheduler.num_layers(), " layers: ", retrieval, " retrieval, ",
                scheduler.num_layers() - retrieval, " streaming; ", geometry.num_q_heads, " query heads, ",
                geometry.num_kv_heads, " KV heads, head_dim ", geometry.head_dim, ", ", name(geometry.dtype), ")");
}

}  // namespace

void bind_scheduler(py::module_& module) {
  py::class_<Scheduler>(module, "Scheduler", "From a plan and a model's geometry to kernels and bytes. Immutable.")
      .def(py::init(&make_scheduler), py::arg("kinds"), py::arg("sink"), py::arg("window"), py::arg("num_q_heads"),
           py::arg("num_kv_heads"), py::arg("head_dim"), py::arg("dtype"),
           py::arg("kv_format") = FormatNames("none", "none"), py::arg("ring_kv_format") = FormatNames("none", "none"))
      .def_property_readonly("num_layers", &Scheduler::num_layers)
      .def_property_readonly("launches_per_step", &Scheduler::launches_per_step,
                             "Attention launches in one decode step: one per layer.")
      .def("kernel", &kernel_name, py::arg("layer"), py::arg("q_len"),
           "Name of the kernel that serves q_len new tokens.")
      .def("slots", &slots, py::arg("layer"), py::arg("max_len"),
           "Slots of the layer's cache for a context of max_len tokens.")
      .def("kv_bytes", &kv_bytes, py::arg("batch"), py::arg("max_len"), py::arg("kind") = py::none(),
           "Bytes of the key and value caches of all layers, or of the layers of one kind, scales included.")
      .def("all_retrieval_kv_bytes", &Scheduler::all_retrieval_kv_bytes, py::arg("batch"), py::arg("max_len"),
           "Bytes of the caches if every layer were a retrieval layer.")
      .def("workspace_bytes", &Scheduler::workspace_bytes, py::arg("batch"),
           "Bytes of scratch that all layers share on CUDA.")
      .def("__repr__", &repr);
}

}  // namespace zigzag::bindings
