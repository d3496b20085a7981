// What this build contains. The build system defines ZIGZAG_VERSION and ZIGZAG_CUDA_ARCHS; a build by hand may leave
// them out.
#include <string>

#include "bindings/c/bindings.h"
#include "cpu/isa.h"

#ifndef ZIGZAG_VERSION
#define ZIGZAG_VERSION "unknown"
#endif
#ifndef ZIGZAG_CUDA_ARCHS
#define ZIGZAG_CUDA_ARCHS ""
#endif

namespace zigzag::bindings {
namespace {

pybind11::dict build_info() {
  pybind11::dict info;
  info["version"] = ZIGZAG_VERSION;
  info["cuda"] = ZIGZAG_WITH_CUDA != 0;
  info["cuda_archs"] = ZIGZAG_WITH_CUDA ? ZIGZAG_CUDA_ARCHS : "";
  info["cpu_isa"] = name(cpu_isa());
  info["compiler"] = __VERSION__;
  return info;
}

}  // namespace

void bind_build_info(pybind11::module_& module) {
  module.def("build_info", &build_info,
             "What this build contains: version, cuda (whether the CUDA kernels were compiled), cuda_archs, "
             "cpu_isa (which build of the CPU kernels runs here), compiler.");
}

}  // namespace zigzag::bindings
