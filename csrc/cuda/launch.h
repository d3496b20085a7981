// Host side of a kernel launch: error check, dynamic shared memory, cluster and PDL attributes in one place.
#pragma once

#include <cuda_runtime.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <set>
#include <tuple>
#include <vector>

#include "core/error.h"

// Runs a CUDA runtime call and throws zigzag::Error with its text and the driver's reason on failure.
#define ZZ_CUDA(call)                                                                                 \
  do {                                                                                                \
    const cudaError_t zz_status = (call);                                                             \
    ZZ_CHECK(zz_status == cudaSuccess, "CUDA error in ", #call, ": ", cudaGetErrorString(zz_status)); \
  } while (false)

namespace zigzag::cuda {

struct DeviceInfo {
  int sm_count;
  int arch;          // 10 * major + minor: 90 for sm_90
  int shared_bytes;  // dynamic shared memory a block may ask for, less 1 KB for what the kernel declares itself
};

// Properties of the current device. Asked for once per process, so that a launch costs no property query.
inline const DeviceInfo& device_info() {
  static const std::vector<DeviceInfo> devices = [] {
    int count = 0;
    ZZ_CUDA(cudaGetDeviceCount(&count));
    const auto attribute = [](cudaDeviceAttr name, int device) {
      int value = 0;
      ZZ_CUDA(cudaDeviceGetAttribute(&value, name, device));
      return value;
    };
    std::vector<DeviceInfo> all;
    for (int i = 0; i < count; ++i) {
      all.push_back(
          {attribute(cudaDevAttrMultiProcessorCount, i),
           10 * attribute(cudaDevAttrComputeCapabilityMajor, i) + attribute(cudaDevAttrComputeCapabilityMinor, i),
           attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, i) - 1024});
    }
    return all;
  }();
  int device = 0;
  ZZ_CUDA(cudaGetDevice(&device));
  return devices[static_cast<size_t>(device)];
}

// Overrides of the launch heuristics, read once from the environment: for tests of the paths that this GPU would not
// take and for tuning. 0 means "as the heuristics say".
struct LaunchOptions {
  bool force_plain;       // ZIGZAG_FORCE_PLAIN=1: nothing above sm_80 (no clusters, no programmatic dependent launch)
  bool dependent_launch;  // ZIGZAG_DEPENDENT_LAUNCH=1: programmatic dependent launch where the kernel supports it
  int cluster;  // ZIGZAG_CLUSTER: blocks per cluster; decode_full takes this size or no clusters, of a batch too
  int warps;    // ZIGZAG_WARPS: warps per block
  int blocks;   // ZIGZAG_BLOCKS: blocks of decode_full's runs, which then serve one row, too, where clusters do not
};

inline const LaunchOptions& launch_options() {
  static const LaunchOptions options = [] {
    const auto read = [](const char* name) {
      const char* value = std::getenv(name);
      return value == nullptr ? 0 : std::atoi(value);
    };
    return LaunchOptions{read("ZIGZAG_FORCE_PLAIN") != 0, read("ZIGZAG_DEPENDENT_LAUNCH") != 0, read("ZIGZAG_CLUSTER"),
                         read("ZIGZAG_WARPS"), read("ZIGZAG_BLOCKS")};
  }();
  return options;
}

// Lets `kernel` use `bytes` of dynamic shared memory on the current device. Remembers the limit it set: the driver is
// asked only when a launch needs more than any before it.
inline void allow_shared_memory(const void* kernel, int bytes) {
  if (bytes <= 47 * 1024) return;  // the default limit of 48 KB, less 1 KB for what the kernel declares itself
  static std::mutex mutex;
  static std::map<std::tuple<const void*, int>, int> limits;
  int device = 0;
  ZZ_CUDA(cudaGetDevice(&device));
  const std::lock_guard<std::mutex> lock(mutex);
  int& limit = limits[{kernel, device}];
  if (bytes <= limit) return;
  ZZ_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  limit = bytes;
}

// Lets `kernel` run in clusters of more than 8 blocks, which is what CUDA promises on every GPU that has clusters.
inline void allow_cluster(const void* kernel, int cluster) {
  if (cluster <= 8) return;
  static std::mutex mutex;
  static std::set<std::tuple<const void*, int>> allowed;
  int device = 0;
  ZZ_CUDA(cudaGetDevice(&device));
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({kernel, device}) > 0) return;
  ZZ_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  allowed.insert({kernel, device});
}

// The architecture, as in DeviceInfo, that `kernel` was compiled for in the version that the current device runs: below
// the device's own where the build has only code for an older one. Asked for once per kernel and device.
inline int code_arch(const void* kernel) {
  static std::mutex mutex;
  static std::map<std::tuple<const void*, int>, int> known;
  int device = 0;
  ZZ_CUDA(cudaGetDevice(&device));
  const std::lock_guard<std::mutex> lock(mutex);
  const auto entry = known.find({kernel, device});
  if (entry != known.end()) return entry->second;
  cudaFuncAttributes attributes = {};
  ZZ_CUDA(cudaFuncGetAttributes(&attributes, kernel));
  return known[{kernel, device}] = attributes.ptxVersion;
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
  bool dependent_launch =
      false;  // programmatic dependent launch: the kernel must call grid_dependency_wait(); needs sm_90
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

// How many clusters of `config` run on the current device at once. Asked for once per kernel, shared memory and cluster
// size. 0 where the GPU has no such clusters.
template <class Params>
int max_active_clusters(void (*kernel)(Params), const LaunchConfig& config) {
  static std::mutex mutex;
  static std::map<std::tuple<const void*, int, int, int>, int> known;
  allow_shared_memory(reinterpret_cast<const void*>(kernel), config.shared_bytes);
  allow_cluster(reinterpret_cast<const void*>(kernel), config.cluster);
  int device = 0;
  ZZ_CUDA(cudaGetDevice(&device));
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [entry, is_new] =
      known.try_emplace({reinterpret_cast<const void*>(kernel), device, config.shared_bytes, config.cluster}, 0);
  if (is_new) {
    LaunchAttributes attributes;
    const cudaLaunchConfig_t launch_config = attributes.fill(config, nullptr);
    const cudaError_t status = cudaOccupancyMaxActiveClusters(&entry->second, kernel, &launch_config);
    if (status != cudaSuccess && config.cluster > 8) {
      cudaGetLastError();  // this GPU refuses the size, which is an answer
      entry->second = 0;
    } else {
      ZZ_CUDA(status);
    }
  }
  return entry->second;
}

// Launches `kernel(params)` on `stream`. Raises the kernel's dynamic shared memory limit where the default 48 KB is too
// small.
template <class Params>
void launch(void (*kernel)(Params), const LaunchConfig& config, const Params& params, void* stream) {
  allow_shared_memory(reinterpret_cast<const void*>(kernel), config.shared_bytes);
  allow_cluster(reinterpret_cast<const void*>(kernel), config.cluster);
  LaunchAttributes attributes;
  const cudaLaunchConfig_t launch_config = attributes.fill(config, stream);
  ZZ_CUDA(cudaLaunchKernelEx(&launch_config, kernel, params));
}

}  // namespace zigzag::cuda
