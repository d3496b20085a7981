// How a decode launch would spread over a GPU, for people: no GPU is asked.
#include <algorithm>
#include <string>

#include "bindings/c/bindings.h"
#include "core/error.h"
#include "kernels/attention.h"
#include "kernels/decode/codes/dispatch.h"
#include "kernels/decode/known_devices.h"
#include "kernels/decode/plan.h"

namespace py = pybind11;

namespace zigzag::bindings {
namespace {

py::tuple known_gpus() {
  const auto& devices = attend::known_devices();
  py::tuple names(devices.size());
  for (std::size_t i = 0; i < devices.size(); ++i) names[i] = devices[i].name;
  return names;
}

py::dict decode_plan(const std::string& gpu, int num_q_heads, int num_kv_heads, int head_dim, int kv_len, int q_len,
                     int batch, const std::string& kv_format, int sink, int window) {
  const attend::KnownDevice& device = attend::known_device(gpu.c_str());
  check_geometry(num_q_heads, num_kv_heads, head_dim);
  ZZ_CHECK(q_len >= 1 && q_len <= kMaxDecodeQueries, "q_len must be 1 to ", kMaxDecodeQueries, ", got ", q_len);
  ZZ_CHECK(batch >= 1, "batch must be 1 or more, got ", batch);
  ZZ_CHECK(sink >= 0 && window >= 0, "sink and window must be 0 or more, got ", sink, " and ", window);
  ZZ_CHECK(kv_len >= q_len, "kv_len must be q_len or more, as it counts the new tokens; got ", kv_len);
  const KvFormat format = parse_kv_format(kv_format);
  ZZ_CHECK(format == KvFormat::kPlain || has_code_kernels(head_dim), "head_dim ", head_dim,
           " is not supported for quantised caches on CUDA; supported: 64, 128");
  const int slots = window > 0 ? sink + window : kv_len, group = num_q_heads / num_kv_heads;
  const attend::DecodeRequest request = {{head_dim, group * q_len > 8 ? 2 : 1, {format, format}},
                                         batch,
                                         num_kv_heads,
                                         group,
                                         q_len,
                                         slots,
                                         sink,
                                         window,
                                         false};
  const auto options = cuda::LaunchOptions::from_environment();
  const auto plan_for = window > 0 ? attend::plan_ring : attend::plan_full;
  const attend::DecodePlan plan = plan_for(request, device.facts, options, attend::cluster_places(device));
  const int64_t read = int64_t{2} * std::min(slots, kv_len) * batch * num_kv_heads *
                       (vector_bytes(format, DType::kBFloat16, head_dim) + scale_bytes(format));
  py::dict told;
  told["gpu"] = device.name;
  told["kernel"] = window > 0 ? "decode_stream" : "decode_full";
  told["blocks"] = plan.blocks();
  told["sms"] = device.facts.sm_count;
  told["warps"] = plan.warps;
  told["stages"] = plan.layout.stages;
  told["team"] = plan.team;
  told["cluster"] = plan.cluster;
  told["spread"] = plan.spread;
  told["merge"] = plan.merge();
  told["one_token"] = plan.one_token;
  told["shared_bytes"] = plan.layout.total;
  told["bytes"] = read;
  told["read_us"] = static_cast<double>(read) / device.facts.bandwidth / 1e3;
  return told;
}

}  // namespace

void bind_decode_plan(py::module_& module) {
  module.def("known_gpus", &known_gpus, "GPUs whose facts decode_plan() knows by their data sheets.");
  module.def(
      "decode_plan", &decode_plan, py::arg("gpu"), py::arg("num_q_heads"), py::arg("num_kv_heads"), py::arg("head_dim"),
      py::arg("kv_len"), py::arg("q_len") = 1, py::arg("batch") = 1, py::arg("kv_format") = "none", py::arg("sink") = 0,
      py::arg("window") = 0,
      "How decode attention over a cache of kv_len tokens (with window > 0 a ring) is launched on `gpu`, one of "
      "known_gpus(), under the environment's overrides: blocks, warps per block, stages of a warp's ring, blocks "
      "of a KV head (team; 0: the keys of all heads are shared out), blocks per cluster, clusters of a team "
      "(spread), how parts are merged, bytes of shared memory per block, bytes of keys and values and the time "
      "that the memory takes for them by its data sheet. How many clusters find a place is a guess: GPUs of one "
      "kind differ.");
}

}  // namespace zigzag::bindings
