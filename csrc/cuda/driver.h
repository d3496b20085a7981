// Functions of the CUDA driver, asked for at run time: nothing links libcuda, so the library loads on a machine without
// a driver.
#pragma once

#include "cuda/launch.h"

namespace zigzag::cuda {

// `version`: of the CUDA that brought the function, as CUDART_VERSION counts, 1000 * major + 10 * minor.
template <class Function>
Function driver_function(const char* name, [[maybe_unused]] unsigned version) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  ZZ_CUDA(cudaGetDriverEntryPointByVersion(name, &function, version, cudaEnableDefault, &found));
#else
  ZZ_CUDA(cudaGetDriverEntryPoint(name, &function, cudaEnableDefault, &found));
#endif
  ZZ_CHECK(found == cudaDriverEntryPointSuccess && function != nullptr, "the CUDA driver has no ", name);
  return reinterpret_cast<Function>(function);
}

}  // namespace zigzag::cuda
