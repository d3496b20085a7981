// Virtual memory of a GPU.
#include <cudaTypedefs.h>

#include <algorithm>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>

#include "cuda/driver.h"
#include "cuda/launch.h"
#include "kv/virtual_memory.h"

namespace zigzag {
namespace {

template <class Function>
Function entry_point(const char* name) {
  return cuda::driver_function<Function>(name, 10020);  // CUDA 10.2 brought all of these
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

// The streams of watch_captures(). Never destroyed: memory may be given back at the end of the process.
class Watched {
 public:
  static Watched& instance() {
    static Watched* const watched = new Watched;
    return *watched;
  }

  void add(int device, const std::vector<void*>& streams) {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::vector<cudaStream_t>& known = streams_[device];
    for (void* stream : streams) {
      if (std::find(known.begin(), known.end(), stream) == known.end())
        known.push_back(static_cast<cudaStream_t>(stream));
    }
  }

  // Whether the current device, number `device`, has a capture under way. Asking does not disturb it, while
  // cudaDeviceSynchronize invalidates the captures of all threads, whatever their modes.
  bool capturing(int device) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const std::vector<cudaStream_t>& known = streams_[device];
    // The default stream fails with cudaErrorStreamCaptureImplicit while a stream that blocks with it captures.
    return captures(cudaStreamLegacy) || captures(cudaStreamPerThread) ||
           std::any_of(known.begin(), known.end(), captures);
  }

 private:
  static bool captures(cudaStream_t stream) {
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    const cudaError_t status = cudaStreamIsCapturing(stream, &capture);
    if (status == cudaErrorStreamCaptureImplicit) {
      cudaGetLastError();
      return true;
    }
    ZZ_CUDA(status);
    return capture != cudaStreamCaptureStatusNone;
  }

  std::mutex mutex_;
  std::map<int, std::vector<cudaStream_t>> streams_;
};

// Memory of some pages, free when no address space has it any more.
class Block {
 public:
  Block(CUmemGenericAllocationHandle handle, int64_t bytes) : handle_(handle), bytes_(bytes) {}
  ~Block() { driver().release(handle_); }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
  CUmemGenericAllocationHandle handle() const { return handle_; }
  int64_t bytes() const { return bytes_; }

 private:
  CUmemGenericAllocationHandle handle_;
  int64_t bytes_;
};
using BlockPtr = std::shared_ptr<const Block>;

// A call of the driver costs the same for one page as for many, 30 to 50 us per block to map it and as much to unmap
// it, but a block is given back as a whole: shrinking to the middle of one moves what stays.
constexpr int64_t kBlockPages = 16;

// Only `device` may touch the memory. Access for its peers would have to be set page by page as well, for every peer,
// and only ops of this device and copies, which torch makes on the device of the source, read a cache.
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
    size_t page = 0;
    check(driver().granularity(&page, &properties_, CU_MEM_ALLOC_GRANULARITY_MINIMUM), "cuMemGetAllocationGranularity");
    page_ = static_cast<int64_t>(page);
  }

  // At the end of a process the driver may be gone: a failure has no one left to hear it.
  ~DeviceAddressSpace() override {
    for (const auto& [offset, block] : blocks_) driver().unmap(at(offset), static_cast<size_t>(block->bytes()));
    if (data_ != 0) driver().address_free(data_, bytes_);
  }

  int64_t page_bytes() const override { return page_; }

  int64_t free_bytes() const override {
    const DeviceScope scope(device_);
    size_t free = 0, total = 0;
    ZZ_CUDA(cudaMemGetInfo(&free, &total));
    return static_cast<int64_t>(free);
  }

  bool could_map(int64_t) const override { return true; }  // map() gives memory or fails

  char* reserve(int64_t bytes, int64_t) override {
    const DeviceScope scope(device_);
    const CUresult status = driver().address_reserve(&data_, static_cast<size_t>(bytes), 0, 0, 0);
    if (status != CUDA_SUCCESS) {
      const std::string limit = address_limit(bytes);  // a GPU address is an address of the process too
      if (!limit.empty()) throw OutOfMemory(concat("cannot reserve ", bytes, " bytes of GPU addresses: ", limit));
      throw Error(
          concat("cannot reserve ", bytes, " bytes of GPU addresses: CUDA driver error ", static_cast<int>(status)));
    }
    bytes_ = static_cast<size_t>(bytes);
    return reinterpret_cast<char*>(data_);
  }

  bool map(const Range& range) override {
    return map_blocks(range,
                      [this](int64_t, int64_t bytes) { return new_block(std::min(bytes, kBlockPages * page_)); });
  }

  // Rows start with a block, and what is committed ends with one.
  bool map_same(const Range& range, AddressSpace& from, int64_t from_offset) override {
    const auto& blocks = static_cast<DeviceAddressSpace&>(from).blocks_;
    return map_blocks(range, [&](int64_t offset, int64_t) { return blocks.at(from_offset + offset - range.offset); });
  }

  bool wait() override {
    const DeviceScope scope(device_);
    if (Watched::instance().capturing(device_)) return false;
    const cudaError_t status = cudaDeviceSynchronize();
    if (status == cudaErrorStreamCaptureUnsupported) {  // a stream that is not watched; this capture is lost
      cudaGetLastError();
      return false;
    }
    ZZ_CUDA(status);
    return true;
  }

  void unmap(const Range& range) override {
    const DeviceScope scope(device_);
    if (const auto next = blocks_.lower_bound(range.offset); next == blocks_.end() || next->first > range.offset) {
      const int64_t block = std::prev(next)->first;
      cut(block, range.offset - block);
    }
    const auto first = blocks_.lower_bound(range.offset), last = blocks_.lower_bound(range.offset + range.bytes);
    if (first == last) return;
    check(driver().unmap(at(first->first), static_cast<size_t>(range.offset + range.bytes - first->first)),
          "cuMemUnmap");
    blocks_.erase(first, last);
  }

 private:
  CUdeviceptr at(int64_t offset) const { return data_ + static_cast<CUdeviceptr>(offset); }

  // Null where memory is out.
  BlockPtr new_block(int64_t bytes) const {
    CUmemGenericAllocationHandle handle = 0;
    const CUresult status = driver().create(&handle, static_cast<size_t>(bytes), &properties_, 0);
    if (status == CUDA_ERROR_OUT_OF_MEMORY) return nullptr;
    check(status, "cuMemCreate");
    return std::make_shared<const Block>(handle, bytes);
  }

  // Gives the block at `offset` back but for its first `bytes`, which move to memory of their own.
  void cut(int64_t offset, int64_t bytes) {
    DeviceAddressSpace moved(device_);
    moved.reserve(bytes, 1);
    if (!moved.map_blocks({0, bytes}, [this](int64_t, int64_t size) { return new_block(size); })) {
      throw OutOfMemory(concat("out of memory: ", bytes, " bytes move when the buffer shrinks, ", free_bytes(),
                               " are free; it is left as it was"));
    }
    ZZ_CUDA(cudaMemcpy(reinterpret_cast<void*>(moved.data_), reinterpret_cast<void*>(at(offset)),
                       static_cast<size_t>(bytes), cudaMemcpyDeviceToDevice));
    ZZ_CUDA(cudaDeviceSynchronize());
    const auto old = blocks_.find(offset);
    check(driver().unmap(at(offset), static_cast<size_t>(old->second->bytes())), "cuMemUnmap");
    blocks_.erase(old);
    ZZ_CHECK(map_same({offset, bytes}, moved, 0), "the driver has no memory for page tables; the row is lost");
  }

  // Blocks of `source(offset, bytes that are still to come)`, null where memory is out; access for all of them at once.
  template <class Source>
  bool map_blocks(const Range& range, Source&& source) {
    const DeviceScope scope(device_);
    const int64_t end = range.offset + range.bytes;
    int64_t offset = range.offset;
    const auto undo = [&] {
      const auto first = blocks_.lower_bound(range.offset), last = blocks_.lower_bound(offset);
      if (first != last) driver().unmap(at(range.offset), static_cast<size_t>(offset - range.offset));
      blocks_.erase(first, last);
    };
    CUresult status = CUDA_SUCCESS;
    try {
      while (offset < end) {
        const BlockPtr block = source(offset, end - offset);
        status = block == nullptr
                     ? CUDA_ERROR_OUT_OF_MEMORY
                     : driver().map(at(offset), static_cast<size_t>(block->bytes()), 0, block->handle(), 0);
        if (status != CUDA_SUCCESS) break;
        blocks_.emplace(offset, block);
        offset += block->bytes();
      }
    } catch (...) {
      undo();
      throw;
    }
    if (status == CUDA_SUCCESS) {
      const CUmemAccessDesc access = {properties_.location, CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
      status = driver().set_access(at(range.offset), static_cast<size_t>(range.bytes), &access, 1);
    }
    if (status == CUDA_SUCCESS) return true;
    undo();
    if (status == CUDA_ERROR_OUT_OF_MEMORY) return false;  // page tables take memory too
    check(status, "cuMemMap or cuMemSetAccess");
    return false;
  }

  int device_;
  int64_t page_ = 0;
  CUmemAllocationProp properties_ = {};
  size_t bytes_ = 0;
  CUdeviceptr data_ = 0;
  std::map<int64_t, BlockPtr> blocks_;  // by offset
};

}  // namespace

std::unique_ptr<AddressSpace> device_address_space(int device) { return std::make_unique<DeviceAddressSpace>(device); }

void watch_captures(int device, const std::vector<void*>& streams) { Watched::instance().add(device, streams); }

}  // namespace zigzag
