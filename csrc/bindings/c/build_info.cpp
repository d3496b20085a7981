// What this build contains. The build system defines ZIGZAG_VERSION and ZIGZAG_CUDA_ARCHS; a build by hand may leave
// them out.
#include <string>

#include "bindings/c/bindings.h"
#include "core/env.h"
#include "core/error.h"
#include "cpu/isa.h"

#ifndef ZIGZAG_VERSION
#define ZIGZAG_VERSION "unknown"
#endif
#ifndef ZIGZAG_CUDA_ARCHS
#define ZIGZAG_CUDA_ARCHS ""
#endif

namespace zigzag::bindings {
namespace {

// A bad ZIGZAG_CPU_ISA must not stop an import, which asks for this: the first op raises.
std::string cpu_isa_or_error() {
  try {
    return name(cpu_isa());
  } catch (const Error& error) {
    return concat("error: ", error.what());
  }
}

pybind11::dict environment() {
  pybind11::dict all;
  for (const EnvVariable& variable : kEnvVariables) {
    all[variable.name] = pybind11::make_tuple(variable.allowed, variable.meaning);
  }
  return all;
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["version"] = ZIGZAG_VERSION;
  info["cuda"] = ZIGZAG_WITH_CUDA != 0;
  info["cuda_archs"] = ZIGZAG_WITH_CUDA ? ZIGZAG_CUDA_ARCHS : "";
  info["cpu_isa"] = cpu_isa_or_error();
  info["compiler"] = __VERSION__;
  return info;
}

}  // namespace

void bind_build_info(pybind11::module_& module) {
  module.def("build_info", &build_info,
             "What this build contains: version, cuda (whether the CUDA kernels were compiled), cuda_archs, "
             "cpu_isa (which build of the CPU kernels runs here, or why none does), compiler.");
  module.def("environment", &environment,
             "Environment variables that the compiled code reads: name -> (allowed values, meaning).");
}

}  // namespace zigzag::bindings
