// Virtual memory of a GPU. The driver's functions are asked for at run time: nothing links libcuda, so the library
// loads on a machine without a driver.
#include <cudaTypedefs.h>

#include "cuda/launch.h"
#include "kv/virtual_memory.h"

namespace zigzag {
namespace {

constexpr unsigned kDriverVersion = 10020;  // CUDA 10.2 brought all of these

template <class Function>
Function entry_point(const char* name) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  ZZ_CUDA(cudaGetDriverEntryPointByVersion(name, &function, kDriverVersion, cudaEnableDefault, &found));
#else
  ZZ_CUDA(cudaGetDriverEntryPoint(name, &function, cudaEnableDefault, &found));
#endif
  ZZ_CHECK(found == cudaDriverEntryPointSuccess && function != nullptr, "the CUDA driver has no ", name);
  return reinterpret_cast<Function>(function);
}

struct Driver {
  PFN_cuMemGetAllocationGranularity_v10020 granularity;
  PFN_cuMemAddressReserve_v10020 address_reserve;
  PFN_cuMemAddressFree_v10020 address_free;
  PFN_cuMemCreate_v10020 create;
  PFN_cuMemRelease_v10020 release;
  PFN_cuMemMap_v10020 map;
  PFN_cuMemUnmap_v10020 unmap;
  PFN_cuMemSetAccess_v10020 set_access;
};

const Driver& driver() {
  static const Driver functions = {
      entry_point<PFN_cuMemGetAllocationGranularity_v10020>("cuMemGetAllocationGranularity"),
      entry_point<PFN_cuMemAddressReserve_v10020>("cuMemAddressReserve"),
      entry_point<PFN_cuMemAddressFree_v10020>("cuMemAddressFree"),
      entry_point<PFN_cuMemCreate_v10020>("cuMemCreate"),
      entry_point<PFN_cuMemRelease_v10020>("cuMemRelease"),
      entry_point<PFN_cuMemMap_v10020>("cuMemMap"),
      entry_point<PFN_cuMemUnmap_v10020>("cuMemUnmap"),
      entry_point<PFN_cuMemSetAccess_v10020>("cuMemSetAccess"),
  };
  return functions;
}

void check(CUresult status, const char* call) {
  ZZ_CHECK(status == CUDA_SUCCESS, call, " failed with CUDA driver error ", static_cast<int>(status));
}

// Makes `device` current for a scope, with its primary context started.
class DeviceScope {
 public:
  explicit DeviceScope(int device) {
    ZZ_CUDA(cudaGetDevice(&before_));
    ZZ_CUDA(cudaSetDevice(device));
  }
  ~DeviceScope() { cudaSetDevice(before_); }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int before_ = 0;
};

class DeviceAddressSpace final : public AddressSpace {
 public:
  explicit DeviceAddressSpace(int device) : device_(device) {
    int count = 0;
    ZZ_CUDA(cudaGetDeviceCount(&count));
    ZZ_CHECK(device >= 0 && device < count, "there is no CUDA device ", device, "; this machine has ", count);
    const DeviceScope scope(device_);
    ZZ_CUDA(cudaFree(nullptr));  // starts the primary context where cudaSetDevice does not
    properties_.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    properties_.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    properties_.location.id = device_;
    check(driver().granularity(&page_, &properties_, CU_MEM_ALLOC_GRANULARITY_MINIMUM),
          "cuMemGetAllocationGranularity");
  }

  // At the end of a process the driver may be gone: a failure has no one left to hear it.
  ~DeviceAddressSpace() override {
    if (data_ != 0) driver().address_free(data_, bytes_);
  }

  int64_t page_bytes() const override { return static_cast<int64_t>(page_); }

  int64_t free_bytes() const override {
    const DeviceScope scope(device_);
    size_t free = 0, total = 0;
    ZZ_CUDA(cudaMemGetInfo(&free, &total));
    return static_cast<int64_t>(free);
  }

  bool could_map(int64_t) const override { return true; }  // map() gives memory or fails

  char* reserve(int64_t bytes) override {
    const DeviceScope scope(device_);
    const CUresult status = driver().address_reserve(&data_, static_cast<size_t>(bytes), 0, 0, 0);
    ZZ_CHECK(status == CUDA_SUCCESS, "cannot reserve ", bytes, " bytes of GPU addresses: CUDA driver error ",
             static_cast<int>(status));
    bytes_ = static_cast<size_t>(bytes);
    return reinterpret_cast<char*>(data_);
  }

  bool map(const Range& range) override {
    const DeviceScope scope(device_);
    const CUdeviceptr at = data_ + static_cast<CUdeviceptr>(range.offset);
    const size_t bytes = static_cast<size_t>(range.bytes);
    CUmemGenericAllocationHandle memory = 0;
    CUresult status = driver().create(&memory, bytes, &properties_, 0);
    if (status == CUDA_ERROR_OUT_OF_MEMORY) return false;
    check(status, "cuMemCreate");
    status = driver().map(at, bytes, 0, memory, 0);
    driver().release(memory);  // the mapping keeps the memory
    if (status == CUDA_SUCCESS) {
      const CUmemAccessDesc access = {properties_.location, CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
      status = driver().set_access(at, bytes, &access, 1);
      if (status != CUDA_SUCCESS) driver().unmap(at, bytes);
    }
    if (status == CUDA_ERROR_OUT_OF_MEMORY) return false;  // page tables take memory too
    check(status, "cuMemMap or cuMemSetAccess");
    return true;
  }

  void unmap(const std::vector<Range>& ranges) override {
    const DeviceScope scope(device_);
    ZZ_CUDA(cudaDeviceSynchronize());
    for (const Range& range : ranges) {
      check(driver().unmap(data_ + static_cast<CUdeviceptr>(range.offset), static_cast<size_t>(range.bytes)),
            "cuMemUnmap");
    }
  }

 private:
  int device_;
  CUmemAllocationProp properties_ = {};
  size_t page_ = 0, bytes_ = 0;
  CUdeviceptr data_ = 0;
};

}  // namespace

std::unique_ptr<AddressSpace> device_address_space(int device) { return std::make_unique<DeviceAddressSpace>(device); }

}  // namespace zigzag
