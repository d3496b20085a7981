// Addresses apart from memory: a range of addresses is reserved once, pages of memory are put under it later. Two
// implementations: virtual_host.cpp (mmap), virtual_device.cu (the CUDA driver's virtual memory).
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace zigzag {

class AddressSpace {
 public:
  struct Range {
    int64_t offset, bytes;  // multiples of page_bytes()
  };

  virtual ~AddressSpace() = default;  // frees the addresses; their memory was unmapped before
  virtual int64_t page_bytes() const = 0;
  // Memory that is free now, in bytes. On the CPU an estimate of the operating system's.
  virtual int64_t free_bytes() const = 0;
  // Whether it makes sense to map that much. False where map() would succeed and the memory be missing later.
  virtual bool could_map(int64_t bytes) const = 0;
  // Once, before all others. Returns the first address. Throws zigzag::Error where the range does not fit.
  virtual char* reserve(int64_t bytes) = 0;
  // Puts memory of unspecified contents under a range that has none. False, with nothing changed, where memory is out;
  // throws zigzag::Error on any other failure.
  virtual bool map(const Range& range) = 0;
  // Takes the memory away again, after the device has done all queued work. Ranges as they were mapped.
  virtual void unmap(const std::vector<Range>& ranges) = 0;
};

std::unique_ptr<AddressSpace> host_address_space();
// `device` is a CUDA ordinal. Throws in a build without CUDA and where there is no such device.
std::unique_ptr<AddressSpace> device_address_space(int device);

}  // namespace zigzag
