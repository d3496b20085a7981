// Which kernel a chunk of a prompt would take on a GPU, for routes and for people: no GPU is asked.
#include <string>

#include "bindings/c/bindings.h"
#include "core/error.h"
#include "kernels/attention.h"
#include "kernels/decode/full/workspace.h"
#include "kernels/prefill/pipeline_plan.h"

namespace py = pybind11;

namespace zigzag::bindings {
namespace {

py::dict prefill_plan(int arch, int sm_count, int num_q_heads, int num_kv_heads, int head_dim, int q_len, int slots,
                      int batch, const std::string& k_format, const std::string& v_format, int window) {
  check_geometry(num_q_heads, num_kv_heads, head_dim);
  ZZ_CHECK(sm_count >= 1, "sm_count must be 1 or more, got ", sm_count);
  ZZ_CHECK(q_len > kMaxDecodeQueries, "q_len must be more than ", kMaxDecodeQueries,
           ", as fewer tokens take a decode kernel; got ", q_len);
  ZZ_CHECK(batch >= 1 && slots >= 0 && window >= 0, "batch must be 1 or more, slots and window 0 or more; got ", batch,
           ", ", slots, " and ", window);
  const prefill::PrefillRequest request = {batch,
                                           num_kv_heads,
                                           num_q_heads / num_kv_heads,
                                           q_len,
                                           head_dim,
                                           slots,
                                           window,
                                           {parse_kv_format(k_format), parse_kv_format(v_format)}};
  cuda::DeviceFacts device;
  device.arch = arch, device.sm_count = sm_count;
  const prefill::PrefillPlan plan = prefill::plan_prefill(request, device, cuda::LaunchOptions::from_environment(),
                                                          attention_workspace_bytes() - decode_full::kCounterBytes);
  py::dict told;
  told["kernel"] = prefill::name(plan.kernel);
  told["tiles"] = plan.tiles;
  told["splits"] = plan.splits;
  return told;
}

}  // namespace

void bind_prefill_plan(py::module_& module) {
  module.def(
      "prefill_plan", &prefill_plan, py::arg("arch"), py::arg("sm_count"), py::arg("num_q_heads"),
      py::arg("num_kv_heads"), py::arg("head_dim"), py::arg("q_len"), py::arg("slots"), py::arg("batch") = 1,
      py::arg("k_format") = "none", py::arg("v_format") = "none", py::arg("window") = 0,
      "Which kernel attends a chunk of q_len tokens over a cache of `slots` slots on a GPU of compute capability "
      "arch (90 for 9.0), under the environment's overrides: kernel (tiles or pipeline), and of the pipeline "
      "how many tiles of query rows there are and how many blocks share the keys of each (splits).");
}

}  // namespace zigzag::bindings
