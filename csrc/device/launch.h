// Host side of a kernel launch: error check, dynamic shared memory, cluster and PDL attributes in one place.
#pragma once

#include <cuda_runtime.h>

#include "core/error.h"

// Runs a CUDA runtime call and throws zigzag::Error with its text and the driver's reason on failure.
#define ZZ_CUDA(call)                                                                                          \
  do {                                                                                                         \
    const cudaError_t zz_status = (call);                                                                      \
    ZZ_CHECK(zz_status == cudaSuccess, "CUDA error in ", #call, ": ", cudaGetErrorString(zz_status));           \
  } while (false)

namespace zigzag::device {

struct LaunchConfig {
  dim3 grid;
  dim3 block;
  int shared_bytes = 0;         // dynamic shared memory
  int cluster = 1;              // blocks per cluster along x; > 1 needs sm_90
  bool dependent_launch = false;  // programmatic dependent launch: the kernel must call grid_dependency_wait(); needs sm_90
};

// Launches `kernel(params)` on `stream`. Raises the kernel's dynamic shared memory limit where the default 48 KB is too small.
template <class Params>
void launch(void (*kernel)(Params), const LaunchConfig& config, const Params& params, void* stream) {
  if (config.shared_bytes > 48 * 1024) {
    ZZ_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, config.shared_bytes));
  }
  cudaLaunchAttribute attributes[2];
  int num_attributes = 0;
  if (config.cluster > 1) {
    attributes[num_attributes].id = cudaLaunchAttributeClusterDimension;
    attributes[num_attributes].val.clusterDim.x = static_cast<unsigned>(config.cluster);
    attributes[num_attributes].val.clusterDim.y = 1;
    attributes[num_attributes].val.clusterDim.z = 1;
    ++num_attributes;
  }
  if (config.dependent_launch) {
    attributes[num_attributes].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[num_attributes].val.programmaticStreamSerializationAllowed = 1;
    ++num_attributes;
  }
  cudaLaunchConfig_t launch_config = {};
  launch_config.gridDim = config.grid;
  launch_config.blockDim = config.block;
  launch_config.dynamicSmemBytes = static_cast<size_t>(config.shared_bytes);
  launch_config.stream = static_cast<cudaStream_t>(stream);
  launch_config.attrs = attributes;
  launch_config.numAttrs = static_cast<unsigned>(num_attributes);
  ZZ_CUDA(cudaLaunchKernelEx(&launch_config, kernel, params));
}

}  // namespace zigzag::device
