// The scheduler's tables for Python: kernels, slots and bytes. Python launches through the torch ops, C++ through
// Scheduler.
#include "engine/scheduler.h"

#include <optional>
#include <string>

#include "bindings/c/kinds.h"

namespace py = pybind11;

namespace zigzag::bindings {
namespace {

Scheduler make_scheduler(const KindNames& kinds, int64_t sink, int64_t window, int num_q_heads, int num_kv_heads,
                         int head_dim, const std::string& dtype, const FormatNames& kv_format,
                         const FormatNames& ring_kv_format, int64_t rollback, const LayerSizes& layer_sizes) {
  return Scheduler(make_plan(kinds, sink, window, layer_sizes),
                   ModelGeometry{num_q_heads, num_kv_heads, head_dim, parse_dtype(dtype), parse_kv_formats(kv_format),
                                 parse_kv_formats(ring_kv_format)},
                   rollback);
}

// The layer's cache of that kind; without one, its only cache.
const CacheSpec& cache_of(const Scheduler& scheduler, int layer, const std::optional<std::string>& kind) {
  const std::vector<CacheSpec>& caches = scheduler.caches(layer);
  ZZ_CHECK(!caches.empty(), "layer ", layer, " keeps no keys: it has no cache");
  if (!kind) {
    ZZ_CHECK(caches.size() == 1, "layer ", layer, " is mixed: say which of its caches, by kind");
    return caches[0];
  }
  const LayerKind wanted = parse_layer_kind(*kind, "the cache has the");
  for (const CacheSpec& cache : caches) {
    if (cache.kind == wanted) return cache;
  }
  throw Error(concat("layer ", layer, " has no ", name(wanted), " cache"));
}

const char* kernel_name(const Scheduler& scheduler, int layer, int q_len, const std::optional<std::string>& kind) {
  ZZ_CHECK(q_len >= 1, "q_len must be >= 1, got ", q_len);
  return name(cache_of(scheduler, layer, kind).kernel(q_len));
}

int64_t slots(const Scheduler& scheduler, int layer, int64_t max_len, const std::optional<std::string>& kind) {
  ZZ_CHECK(max_len >= 0, "max_len must be >= 0, got ", max_len);
  return cache_of(scheduler, layer, kind).slots(max_len);
}

py::dict heads(const Scheduler& scheduler, int layer) {
  py::dict all;
  for (const CacheSpec& cache : scheduler.caches(layer)) {
    py::tuple numbers(static_cast<std::size_t>(cache.num_kv_heads));
    for (std::size_t i = 0; i < numbers.size(); ++i) {
      numbers[i] = cache.heads.empty() ? static_cast<int>(i) : cache.heads[i];
    }
    all[name(cache.kind)] = numbers;
  }
  return all;
}

int64_t kv_bytes_of(const Scheduler& scheduler, int64_t batch, int64_t max_len,
                    const std::optional<std::string>& kind) {
  const KvBytes bytes = scheduler.kv_bytes(batch, max_len);
  return kind ? bytes.of(parse_layer_kind(*kind, "the cache has the")) : bytes.total();
}

int64_t kv_bytes_of_shape(int64_t slots, int64_t num_kv_heads, int64_t head_dim, int64_t element_bytes,
                          const FormatNames& kv_format, std::optional<int64_t> value_dim, int64_t batch) {
  return kv_bytes(
      {num_kv_heads, slots, head_dim, value_dim.value_or(head_dim), element_bytes, parse_kv_formats(kv_format)}, batch);
}

int64_t slots_of_kind(const std::string& kind, int64_t sink, int64_t window, int64_t max_len, int64_t rollback) {
  return cache_slots(parse_layer_kind(kind, "the cache has the"), sink, window, rollback, max_len);
}

std::string repr(const Scheduler& scheduler) {
  int retrieval = 0, mixed = 0, native = 0, state = 0;
  for (int layer = 0; layer < scheduler.num_layers(); ++layer) {
    const std::vector<CacheSpec>& caches = scheduler.caches(layer);
    mixed += caches.size() > 1;
    retrieval += caches.size() == 1 && caches[0].kind == LayerKind::kRetrieval;
    native += caches.size() == 1 && caches[0].kind == LayerKind::kNative;
    state += caches.empty();
  }
  const ModelGeometry& geometry = scheduler.geometry();
  return concat("Scheduler(", scheduler.num_layers(), " layers: ", retrieval, " retrieval, ",
                scheduler.num_layers() - retrieval - mixed - native - state, " streaming",
                mixed ? concat(", ", mixed, " mixed") : "", native ? concat(", ", native, " native") : "",
                state ? concat(", ", state, " without keys") : "", "; ", geometry.num_q_heads, " query heads, ",
                geometry.num_kv_heads, " KV heads, head_dim ", geometry.head_dim, ", ", name(geometry.dtype), ")");
}

}  // namespace

void bind_scheduler(py::module_& module) {
  py::class_<Scheduler>(module, "Scheduler", "From a plan and a model's geometry to kernels and bytes. Immutable.")
      .def(py::init(&make_scheduler), py::arg("kinds"), py::arg("sink"), py::arg("window"), py::arg("num_q_heads"),
           py::arg("num_kv_heads"), py::arg("head_dim"), py::arg("dtype"),
           py::arg("kv_format") = FormatNames("none", "none"), py::arg("ring_kv_format") = FormatNames("none", "none"),
           py::arg("rollback") = 0, py::arg("layer_sizes") = LayerSizes())
      .def_property_readonly("num_layers", &Scheduler::num_layers)
      .def_property_readonly(
          "launches_per_step", &Scheduler::launches_per_step,
          "Attention launches in one decode step: one per layer, two where it is mixed, none without keys.")
      .def("kernel", &kernel_name, py::arg("layer"), py::arg("q_len"), py::arg("kind") = py::none(),
           "Name of the kernel that serves q_len new tokens; `kind` says which cache of a mixed layer.")
      .def("slots", &slots, py::arg("layer"), py::arg("max_len"), py::arg("kind") = py::none(),
           "Slots of the layer's cache for a context of max_len tokens; `kind` as in `kernel`.")
      .def("heads", &heads, py::arg("layer"), "KV heads of each cache of the layer, by kind.")
      .def("kv_bytes", &kv_bytes_of, py::arg("batch"), py::arg("max_len"), py::arg("kind") = py::none(),
           "Bytes of the key and value caches of all layers, or of the layers of one kind, scales included.")
      .def("all_retrieval_kv_bytes", &Scheduler::all_retrieval_kv_bytes, py::arg("batch"), py::arg("max_len"),
           "Bytes of the caches if every layer were a retrieval layer.")
      .def("__repr__", &repr);
  module.def(
      "kv_bytes", &kv_bytes_of_shape, py::arg("slots"), py::arg("num_kv_heads"), py::arg("head_dim"),
      py::arg("element_bytes"), py::arg("kv_format") = FormatNames("none", "none"), py::arg("value_dim") = py::none(),
      py::arg("batch") = 1,
      "Bytes of the keys, values and scales of one layer, or of some of its KV heads, without rounding to pages.");
  module.def("cache_slots", &slots_of_kind, py::arg("kind"), py::arg("sink"), py::arg("window"), py::arg("max_len"),
             py::arg("rollback") = 0, "Slots per KV head of a cache of that kind, for a context of max_len tokens.");
}

}  // namespace zigzag::bindings
