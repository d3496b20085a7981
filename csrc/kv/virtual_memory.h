// Addresses apart from memory: a range of addresses is reserved once, pages of memory are put under it later. Two
// implementations: virtual_host.cpp (mmap), virtual_device.cu (the CUDA driver's virtual memory).
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/error.h"

namespace zigzag {

// Memory, or the addresses that a limit of the process allows, ran out. Python's MemoryError.
class OutOfMemory : public Error {
 public:
  using Error::Error;
};

// For one thread at a time. The destructor frees the addresses and what memory is under them, without waiting for the
// device.
class AddressSpace {
 public:
  struct Range {
    int64_t offset, bytes;  // multiples of page_bytes()
  };

  virtual ~AddressSpace() = default;
  virtual int64_t page_bytes() const = 0;
  // Memory that is free now, in bytes. On the CPU an estimate, see host_free_bytes().
  virtual int64_t free_bytes() const = 0;
  // Whether it makes sense to map that much. False where map() would succeed and the memory be missing later.
  virtual bool could_map(int64_t bytes) const = 0;
  // Once, before all others. Returns the first address. `rows`: parts of the range that will grow on their own. Throws
  // OutOfMemory with the limit's name where a limit of the process forbids it, zigzag::Error where there is no such
  // range.
  virtual char* reserve(int64_t bytes, int64_t rows) = 0;
  // Puts memory of unspecified contents under a range that has none. False, with nothing changed, where memory is out;
  // throws zigzag::Error on any other failure.
  virtual bool map(const Range& range) = 0;
  // As map(), with the contents of the range of the same size at `from_offset` of another space of the same kind and
  // device: the same memory on CUDA, which is freed with the last of its mappings, a copy on the CPU.
  virtual bool map_same(const Range& range, AddressSpace& from, int64_t from_offset) = 0;
  // Waits until the device has done all queued work. False, and nothing was done, where a stream capture is under way,
  // which waiting would invalidate.
  virtual bool wait() = 0;
  // Takes memory away that no queued work uses: after wait(), or just mapped. Throws OutOfMemory, with nothing changed,
  // where giving back a part of what was mapped at once takes memory itself; never for all of it.
  virtual void unmap(const Range& range) = 0;
};

std::unique_ptr<AddressSpace> host_address_space();
// `device` is a CUDA ordinal. Throws in a build without CUDA and where there is no such device.
std::unique_ptr<AddressSpace> device_address_space(int device);

// Bytes that this process can still take without swapping: the least of what Linux says is available and of what the
// memory limits of its control groups (versions 1 and 2) leave. No limit where the system does not say. The files are
// read under `root`.
int64_t host_free_bytes(const std::string& root = "");

// What keeps this process from reserving `bytes` more of addresses: a limit by name with its numbers, or nothing.
std::string address_limit(int64_t bytes);

// Streams of a device, of type cudaStream_t, on which captures may be under way when memory is given back. They have to
// live as long as the process. What blocks with the default stream needs no mention. A build without CUDA knows none.
void watch_captures(int device, const std::vector<void*>& streams);

}  // namespace zigzag
