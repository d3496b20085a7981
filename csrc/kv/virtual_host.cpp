// Virtual memory of the CPU: pages are without access until they are mapped, so that a read past what is committed
// faults as it does on a GPU. The operating system finds the memory at the first write of each page.
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <limits>
#include <string>

#include "core/error.h"
#include "kv/virtual_memory.h"

namespace zigzag {
namespace {

class HostAddressSpace final : public AddressSpace {
 public:
  ~HostAddressSpace() override {
    if (data_ != nullptr) munmap(data_, static_cast<std::size_t>(bytes_));
  }

  int64_t page_bytes() const override { return sysconf(_SC_PAGESIZE); }

  // What Linux estimates can be had without swapping; no limit where it does not say.
  int64_t free_bytes() const override {
    std::ifstream info("/proc/meminfo");
    for (std::string word; info >> word;) {
      if (int64_t kilobytes = 0; word == "MemAvailable:" && info >> kilobytes) return kilobytes * 1024;
    }
    return std::numeric_limits<int64_t>::max();
  }

  bool could_map(int64_t bytes) const override { return bytes <= free_bytes(); }

  char* reserve(int64_t bytes) override {
    void* data = mmap(nullptr, static_cast<std::size_t>(bytes), PROT_NONE, kFlags, -1, 0);
    ZZ_CHECK(data != MAP_FAILED, "cannot reserve ", bytes, " bytes of addresses: ", std::strerror(errno));
    bytes_ = bytes;
    return data_ = static_cast<char*>(data);
  }

  bool map(const Range& range) override {
    if (mprotect(data_ + range.offset, static_cast<std::size_t>(range.bytes), PROT_READ | PROT_WRITE) == 0) return true;
    ZZ_CHECK(errno == ENOMEM, "cannot map ", range.bytes, " bytes: ", std::strerror(errno));
    return false;
  }

  // New pages in place of the old ones: drops the memory and the access in one call.
  void unmap(const std::vector<Range>& ranges) override {
    for (const Range& range : ranges) {
      void* fresh =
          mmap(data_ + range.offset, static_cast<std::size_t>(range.bytes), PROT_NONE, kFlags | MAP_FIXED, -1, 0);
      ZZ_CHECK(fresh != MAP_FAILED, "cannot give ", range.bytes, " bytes back: ", std::strerror(errno));
    }
  }

 private:
  static constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS;
  char* data_ = nullptr;
  int64_t bytes_ = 0;
};

}  // namespace

std::unique_ptr<AddressSpace> host_address_space() { return std::make_unique<HostAddressSpace>(); }

}  // namespace zigzag
