// Virtual memory of the CPU. All that is reserved can be read: pages without memory are the system's page of zeros.
// What is committed can be written too, and the system finds the memory at the first write of each page.
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <iterator>
#include <limits>
#include <string>

#include "core/error.h"
#include "kv/virtual_memory.h"

namespace zigzag {
namespace {

constexpr int64_t kNoLimit = std::numeric_limits<int64_t>::max();

// The first number in a file, or `otherwise` where there is no such file or it begins with a word, as "max".
int64_t number_in(const std::string& path, int64_t otherwise) {
  int64_t number = 0;
  return std::ifstream(path) >> number ? number : otherwise;
}

// The number behind the word `name` in a file of names and numbers.
int64_t number_of(const std::string& path, const std::string& name, int64_t otherwise) {
  std::ifstream file(path);
  for (std::string word; file >> word;) {
    if (int64_t number = 0; word == name && file >> number) return number;
  }
  return otherwise;
}

// What the limit of one control group leaves; files that it only caches can be dropped.
int64_t group_free(const std::string& group, const char* limit, const char* use, const char* cached) {
  const int64_t most = number_in(group + limit, kNoLimit);
  if (most == kNoLimit) return kNoLimit;
  const int64_t used = number_in(group + use, 0) - number_of(group + "/memory.stat", cached, 0);
  return std::max<int64_t>(0, most - std::max<int64_t>(0, used));
}

// The least that the group `path` and those above it leave. In a container the path may be one of outside: what is not
// there is passed over.
int64_t groups_free(const std::string& mount, std::string path, const char* limit, const char* use,
                    const char* cached) {
  for (int64_t free = kNoLimit;;) {
    free = std::min(free, group_free(mount + path, limit, use, cached));
    if (path.empty()) return free;
    path.erase(path.find_last_of('/'));
  }
}

int64_t max_mappings() { return number_in("/proc/sys/vm/max_map_count", kNoLimit); }

int64_t mappings() {
  std::ifstream maps("/proc/self/maps");
  return std::count(std::istreambuf_iterator<char>(maps), std::istreambuf_iterator<char>(), '\n');
}

std::string mapping_limit() {
  const int64_t used = mappings(), most = max_mappings();
  if (used + 2 <= most) return {};
  return concat("the process has ", used, " mappings of memory, vm.max_map_count allows ", most);
}

std::string resource_limit(int resource, const char* name, int64_t bytes, int64_t used) {
  rlimit limit{};
  if (getrlimit(static_cast<__rlimit_resource>(resource), &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) return {};
  const int64_t most = static_cast<int64_t>(std::min<rlim_t>(limit.rlim_cur, kNoLimit));
  if (bytes <= most - used) return {};
  return concat("the limit ", name, " is ", most, " bytes, and ", used, " are in use");
}

int64_t status_bytes(const char* name) { return number_of("/proc/self/status", name, 0) * 1024; }

class HostAddressSpace final : public AddressSpace {
 public:
  ~HostAddressSpace() override {
    if (data_ == nullptr) return;
    munmap(data_, static_cast<std::size_t>(bytes_));
    growing_rows() -= rows_;
  }

  int64_t page_bytes() const override { return sysconf(_SC_PAGESIZE); }
  int64_t free_bytes() const override { return host_free_bytes(); }
  bool could_map(int64_t bytes) const override { return bytes <= free_bytes(); }

  // Every row is two mappings, what can be written and the rest. A process has 65,530 of them: when rows have taken
  // half, the buffers to come are one mapping each, which can be written as a whole.
  char* reserve(int64_t bytes, int64_t rows) override {
    static const int64_t most_rows = max_mappings() / 4;
    if (growing_rows() += rows; growing_rows() > most_rows) {
      growing_rows() -= rows;
      rows = 0;
    }
    const int access = rows > 0 ? PROT_READ : PROT_READ | PROT_WRITE, flags = rows > 0 ? 0 : MAP_NORESERVE;
    void* data = mmap(nullptr, static_cast<std::size_t>(bytes), access, kFlags | flags, -1, 0);
    if (data == MAP_FAILED) {
      const std::string reason = std::strerror(errno), limit = address_limit(bytes);
      growing_rows() -= rows;
      if (!limit.empty()) throw OutOfMemory(concat("cannot reserve ", bytes, " bytes of addresses: ", limit));
      throw Error(concat("cannot reserve ", bytes, " bytes of addresses: ", reason));
    }
    bytes_ = bytes;
    rows_ = rows;
    return data_ = static_cast<char*>(data);
  }

  bool map(const Range& range) override {
    if (rows_ == 0 || mprotect(at(range), size(range), PROT_READ | PROT_WRITE) == 0) return true;
    ZZ_CHECK(errno == ENOMEM, "cannot map ", range.bytes, " bytes: ", std::strerror(errno));
    std::string limit = mapping_limit();
    if (limit.empty())
      limit = resource_limit(RLIMIT_DATA, "RLIMIT_DATA (ulimit -d)", range.bytes, status_bytes("VmData:"));
    if (!limit.empty()) throw OutOfMemory(concat("out of memory: cannot map ", range.bytes, " bytes: ", limit));
    return false;
  }

  bool map_same(const Range& range, AddressSpace& from, int64_t from_offset) override {
    if (!map(range)) return false;
    std::memcpy(at(range), static_cast<HostAddressSpace&>(from).data_ + from_offset, size(range));
    return true;
  }

  bool wait() override { return true; }

  // New pages in place of the old ones, in one step: a thread that reads finds the old contents or zeros. Where that
  // would be a mapping too many, the pages go and can still be written.
  void unmap(const Range& range) override {
    if (rows_ > 0 && mmap(at(range), size(range), PROT_READ, kFlags | MAP_FIXED, -1, 0) != MAP_FAILED) return;
    ZZ_CHECK(madvise(at(range), size(range), MADV_DONTNEED) == 0, "cannot give ", range.bytes,
             " bytes back: ", std::strerror(errno));
  }

 private:
  static constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS;

  static std::atomic<int64_t>& growing_rows() {
    static std::atomic<int64_t> rows{0};
    return rows;
  }

  char* at(const Range& range) const { return data_ + range.offset; }
  static std::size_t size(const Range& range) { return static_cast<std::size_t>(range.bytes); }

  char* data_ = nullptr;
  int64_t bytes_ = 0, rows_ = 0;  // rows that have mappings of their own
};

}  // namespace

std::unique_ptr<AddressSpace> host_address_space() { return std::make_unique<HostAddressSpace>(); }

int64_t host_free_bytes(const std::string& root) {
  int64_t free = number_of(root + "/proc/meminfo", "MemAvailable:", kNoLimit / 1024) * 1024;
  std::ifstream groups(root + "/proc/self/cgroup");  // lines "hierarchy:controllers:/path"
  for (std::string line; std::getline(groups, line);) {
    const std::size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = ',' + line.substr(first + 1, second - first - 1) + ',',
                      mount = root + "/sys/fs/cgroup";
    std::string path = line.substr(second + 1);
    if (path == "/") path.clear();
    if (controllers == ",,") {
      free = std::min(free, groups_free(mount, path, "/memory.max", "/memory.current", "inactive_file"));
    } else if (controllers.find(",memory,") != std::string::npos) {
      free = std::min(free, groups_free(mount + "/memory", path, "/memory.limit_in_bytes", "/memory.usage_in_bytes",
                                        "total_inactive_file"));
    }
  }
  return free;
}

std::string address_limit(int64_t bytes) {
  const std::string limit = resource_limit(RLIMIT_AS, "RLIMIT_AS (ulimit -v)", bytes, status_bytes("VmSize:"));
  return limit.empty() ? mapping_limit() : limit;
}

}  // namespace zigzag
