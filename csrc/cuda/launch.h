// Host side of a kernel launch: error check, dynamic shared memory, cluster and PDL attributes in one place.
#pragma once

#include <cuda_runtime.h>
#include <cxxabi.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "core/env.h"
#include "core/error.h"
#include "cuda/device_facts.h"

// Runs a CUDA runtime call and throws zigzag::Error with its text and the driver's reason on failure, which it does not
// leave behind as the runtime's last error: the next call that asks for that one would report it as its own.
#define ZZ_CUDA(call)                                                                                        \
  do {                                                                                                       \
    const cudaError_t zz_status = (call);                                                                    \
    if (zz_status != cudaSuccess) {                                                                          \
      cudaGetLastError();                                                                                    \
      throw ::zigzag::Error(::zigzag::concat("CUDA error in ", #call, ": ", cudaGetErrorString(zz_status))); \
    }                                                                                                        \
  } while (false)

namespace zigzag::cuda {

// Facts of the current device. Asked for once per process, so that a launch costs no property query.
inline const DeviceFacts& device_facts() {
  static const std::vector<DeviceFacts> devices = [] {
    int count = 0;
    ZZ_CUDA(cudaGetDeviceCount(&count));
    const auto attribute = [](cudaDeviceAttr name, int device) {
      int value = 0;
      ZZ_CUDA(cudaDeviceGetAttribute(&value, name, device));
      return value;
    };
    std::vector<DeviceFacts> all(static_cast<size_t>(count));
    for (int i = 0; i < count; ++i) {
      DeviceFacts& facts = all[static_cast<size_t>(i)];
      facts.arch =
          10 * attribute(cudaDevAttrComputeCapabilityMajor, i) + attribute(cudaDevAttrComputeCapabilityMinor, i);
      facts.sm_count = attribute(cudaDevAttrMultiProcessorCount, i);
      facts.shared_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, i);
      facts.shared_per_sm = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, i);
      // Two transfers a clock, of which the attribute has thousands a second; the width is in bits.
      facts.bandwidth = static_cast<int>(2.0 * attribute(cudaDevAttrMemoryClockRate, i) *
                                         attribute(cudaDevAttrGlobalMemoryBusWidth, i) / 8 / 1e6);
    }
    return all;
  }();
  int device = 0;
  ZZ_CUDA(cudaGetDevice(&device));
  return devices[static_cast<size_t>(device)];
}

// Read once from the environment.
inline const LaunchOptions& launch_options() {
  static const LaunchOptions options = LaunchOptions::from_environment();
  return options;
}

constexpr int floor_log2(int x) {
  int log2 = 0;
  while (x >> (log2 + 1) > 0) ++log2;
  return log2;
}

struct LaunchConfig {
  dim3 grid;
  dim3 block;
  int shared_bytes = 0;  // dynamic shared memory
  int cluster = 1;       // blocks per cluster along x; > 1 needs sm_90
  // Programmatic dependent launch: the kernel must call grid_dependency_wait(). Needs sm_90.
  bool dependent_launch = false;
};

// The runtime's form of a LaunchConfig, which points into this object.
struct LaunchAttributes {
  cudaLaunchAttribute attributes[2];

  cudaLaunchConfig_t fill(const LaunchConfig& config, void* stream) {
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
    return launch_config;
  }
};

// What is known of one kernel on one device: asked for once, so that a launch costs no query. Kept where the question
// was answered only: a query that throws is asked again.
struct KernelFacts {
  int arch = 0;  // of the code that runs, as in DeviceFacts: below the device's own where the build has no newer
  int shared_limit = 0;         // dynamic shared memory that was allowed so far, beyond the default
  bool large_clusters = false;  // clusters of more than 8 blocks were allowed
  std::map<std::pair<int, int>, int> active_clusters;  // {shared bytes, cluster} -> clusters that run at once
};

struct KnownKernels {
  std::mutex mutex;
  std::map<std::pair<const void*, int>, KernelFacts> facts;  // by kernel and device
};

// One table for all that ask: what one of them allows a kernel is what the next one may rely on. (A static of the
// template below would be one table for each of its instances.)
inline KnownKernels& known_kernels() {
  static KnownKernels known;
  return known;
}

// Calls f(facts) with those of `kernel` on the current device, one caller at a time.
template <class F>
auto with_kernel_facts(const void* kernel, F&& f) {
  int device = 0;
  ZZ_CUDA(cudaGetDevice(&device));
  KnownKernels& known = known_kernels();
  const std::lock_guard<std::mutex> lock(known.mutex);
  return f(known.facts[{kernel, device}]);
}

// "name, grid (x, y, z), block n, s bytes of dynamic shared memory, clusters of c": what an error says of a launch.
inline std::string launch_text(const void* kernel, const LaunchConfig& config) {
  std::string text = "a kernel";
#if CUDART_VERSION >= 12030
  const char* symbol = nullptr;
  if (cudaFuncGetName(&symbol, kernel) == cudaSuccess && symbol != nullptr) {
    int status = 0;
    char* readable = abi::__cxa_demangle(symbol, nullptr, nullptr, &status);
    text = status == 0 ? readable : symbol;
    std::free(readable);
  }
#endif
  return concat(text, ", grid (", config.grid.x, ", ", config.grid.y, ", ", config.grid.z, "), block ", config.block.x,
                ", ", config.shared_bytes, " bytes of dynamic shared memory, clusters of ", config.cluster);
}

inline void check_launch(cudaError_t status, const char* what, const void* kernel, const LaunchConfig& config) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // as ZZ_CUDA
  throw Error(concat("CUDA error in ", what, " ", launch_text(kernel, config), ": ", cudaGetErrorString(status)));
}

// Lets `kernel` use the shared memory and cluster size of `config`. CUDA promises 48 KB, of which 1 KB is left to what
// the kernel declares itself, and clusters of 8 on every GPU that has clusters.
inline void allow(const void* kernel, const LaunchConfig& config, KernelFacts& facts) {
  if (config.shared_bytes > 47 * 1024 && config.shared_bytes > facts.shared_limit) {
    check_launch(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, config.shared_bytes),
                 "allowing the shared memory of", kernel, config);
    facts.shared_limit = config.shared_bytes;
  }
  if (config.cluster > 8 && !facts.large_clusters) {
    check_launch(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
                 "allowing the clusters of", kernel, config);
    facts.large_clusters = true;
  }
}

// KernelFacts::arch of `kernel` on the current device.
inline int code_arch(const void* kernel) {
  return with_kernel_facts(kernel, [&](KernelFacts& facts) {
    if (facts.arch == 0) {
      cudaFuncAttributes attributes = {};
      ZZ_CUDA(cudaFuncGetAttributes(&attributes, kernel));
      facts.arch = attributes.ptxVersion;
    }
    return facts.arch;
  });
}

// How many clusters of `config` run on the current device at once. 0 where the GPU has no such clusters.
template <class Params>
int max_active_clusters(void (*kernel)(Params), const LaunchConfig& config) {
  const void* function = reinterpret_cast<const void*>(kernel);
  return with_kernel_facts(function, [&](KernelFacts& facts) {
    const std::pair<int, int> key(config.shared_bytes, config.cluster);
    const auto entry = facts.active_clusters.find(key);
    if (entry != facts.active_clusters.end()) return entry->second;
    allow(function, config, facts);
    LaunchAttributes attributes;
    const cudaLaunchConfig_t launch_config = attributes.fill(config, nullptr);
    int clusters = 0;
    const cudaError_t status = cudaOccupancyMaxActiveClusters(&clusters, kernel, &launch_config);
    if (status != cudaSuccess && config.cluster > 8) {
      cudaGetLastError();  // this GPU refuses the size, which is an answer
      clusters = 0;
    } else {
      check_launch(status, "counting the clusters of", function, config);
    }
    return facts.active_clusters[key] = clusters;
  });
}

// Launches `kernel(params)` on `stream`, with as much shared memory and as large clusters as `config` says.
template <class Params>
void launch(void (*kernel)(Params), const LaunchConfig& config, const Params& params, void* stream) {
  const void* function = reinterpret_cast<const void*>(kernel);
  if (config.shared_bytes > 47 * 1024 || config.cluster > 8) {
    with_kernel_facts(function, [&](KernelFacts& facts) { allow(function, config, facts); });
  }
  LaunchAttributes attributes;
  const cudaLaunchConfig_t launch_config = attributes.fill(config, stream);
  check_launch(cudaLaunchKernelEx(&launch_config, kernel, params), "the launch of", function, config);
}

}  // namespace zigzag::cuda
