// Buffers that grow where they stand: on the CPU, on a GPU where there is one, and over memory that fails on purpose.
#include <doctest/doctest.h>

#include <cstdint>
#include <map>
#include <memory>
#include <string>

#include "kv/virtual_buffer.h"

#if ZIGZAG_WITH_CUDA
#include "cuda_testing.h"
#endif

namespace {

using namespace zigzag;

constexpr int64_t kTerabyte = int64_t{1} << 40;
constexpr int64_t kTooMuch = 8 * kTerabyte;  // more than any machine has free, less than it has addresses

template <class Exception = Error, class Call>
std::string error_of(Call&& call) {
  try {
    call();
  } catch (const Exception& error) {
    return error.what();
  }
  return "no error";
}

// Pages of 16 bytes that exist on paper, and a budget of them.
struct Ledger {
  int64_t free = 1000, mapped = 0, unmapped_calls = 0;
  int maps_until_failure = -1;        // that many succeed; -1: all
  std::map<int64_t, int64_t> ranges;  // offset -> bytes
};

class PaperSpace final : public AddressSpace {
 public:
  explicit PaperSpace(Ledger& ledger) : ledger_(ledger) {}
  int64_t page_bytes() const override { return 16; }
  int64_t free_bytes() const override { return ledger_.free; }
  bool could_map(int64_t bytes) const override { return bytes <= ledger_.free; }
  char* reserve(int64_t bytes) override {
    reserved_ = bytes;
    return reinterpret_cast<char*>(uintptr_t{4096});
  }
  bool map(const Range& range) override {
    CHECK(range.offset % 16 == 0);
    CHECK(range.bytes % 16 == 0);
    CHECK(range.bytes > 0);
    CHECK(range.offset + range.bytes <= reserved_);
    if (ledger_.maps_until_failure == 0) return false;
    if (ledger_.maps_until_failure > 0) --ledger_.maps_until_failure;
    CHECK(ledger_.ranges.emplace(range.offset, range.bytes).second);
    ledger_.mapped += range.bytes;
    return true;
  }
  void unmap(const std::vector<Range>& ranges) override {
    ++ledger_.unmapped_calls;
    for (const Range& range : ranges) {
      CHECK(ledger_.ranges.at(range.offset) == range.bytes);
      ledger_.ranges.erase(range.offset);
      ledger_.mapped -= range.bytes;
    }
  }

 private:
  Ledger& ledger_;
  int64_t reserved_ = 0;
};

}  // namespace

TEST_CASE("VirtualBuffer: rows grow together, in whole pages, each from a page of its own") {
  Ledger ledger;
  {
    VirtualBuffer buffer(std::make_unique<PaperSpace>(ledger), 3, 50);
    CHECK(buffer.row_stride() == 64);
    CHECK(buffer.reserved_bytes() == 192);
    CHECK(ledger.mapped == 0);
    buffer.commit(0);
    CHECK(ledger.mapped == 0);
    buffer.commit(17);
    CHECK(ledger.ranges == std::map<int64_t, int64_t>{{0, 32}, {64, 32}, {128, 32}});
    CHECK(buffer.committed_row_bytes() == 32);
    CHECK(buffer.committed_bytes() == 96);
    buffer.commit(32);
    buffer.commit(3);
    CHECK(ledger.mapped == 96);
    buffer.commit(50);
    CHECK(ledger.ranges.at(96) == 32);
    CHECK(ledger.mapped == 192);
    buffer.release();
    CHECK(ledger.mapped == 0);
    CHECK(buffer.committed_bytes() == 0);
    buffer.commit(1);
    CHECK(ledger.mapped == 48);
  }
  CHECK(ledger.mapped == 0);  // the destructor gives everything back
}

TEST_CASE("VirtualBuffer: out of memory leaves it as it was") {
  Ledger ledger;
  VirtualBuffer buffer(std::make_unique<PaperSpace>(ledger), 3, 1 << 20);
  buffer.commit(16);
  const auto before = ledger.ranges;
  CHECK(error_of<OutOfMemory>([&] { buffer.commit(1000); }) ==
        "out of memory: the buffer grows by 2976 bytes, 0 of them were found and 1000 bytes are free now; it is left "
        "as it was");
  CHECK(ledger.unmapped_calls == 0);
  ledger.maps_until_failure = 2;  // the third row finds none
  CHECK(error_of<OutOfMemory>([&] { buffer.commit(48); }).find("grows by 96 bytes, 64 of them were found and 1000") !=
        std::string::npos);
  CHECK(ledger.ranges == before);
  CHECK(buffer.committed_row_bytes() == 16);
  ledger.maps_until_failure = -1;
  buffer.commit(48);
  CHECK(ledger.mapped == 144);
}

TEST_CASE("VirtualBuffer: refuses sizes that make no sense") {
  Ledger ledger;
  const auto make = [&](int64_t rows, int64_t row_bytes) {
    return error_of([&] { VirtualBuffer(std::make_unique<PaperSpace>(ledger), rows, row_bytes); });
  };
  CHECK(make(0, 5).find("got 0 and 5") != std::string::npos);
  CHECK(make(5, -1).find("got 5 and -1") != std::string::npos);
  CHECK(make(1, INT64_MAX).find("at most 2^60 bytes") != std::string::npos);
  CHECK(make(int64_t{1} << 40, int64_t{1} << 40).find("at most 2^60 bytes") != std::string::npos);
  CHECK(error_of([&] { VirtualBuffer(std::make_unique<PaperSpace>(ledger), 1, 5, 0); }).find("unit_bytes") !=
        std::string::npos);
  CHECK(VirtualBuffer(std::make_unique<PaperSpace>(ledger), 2, 50, 24).row_stride() == 96);  // pages of 16, units of 24
  VirtualBuffer buffer(std::make_unique<PaperSpace>(ledger), 1, 50);
  CHECK(error_of([&] { buffer.commit(65); }) == "commit takes 0 to 64 bytes per row, got 65");
  CHECK(error_of([&] { buffer.commit(-1); }).find("got -1") != std::string::npos);
}

TEST_CASE("VirtualBuffer on the CPU: terabytes of addresses, memory as it grows, contents and addresses kept") {
  VirtualBuffer buffer(host_address_space(), 2, kTooMuch + 1);
  char* const data = buffer.data();
  const int64_t page = buffer.page_bytes();
  CHECK(buffer.reserved_bytes() >= 2 * kTooMuch);
  for (const int64_t bytes : {int64_t{1}, page + 1, int64_t{1} << 20}) {
    buffer.commit(bytes);
    CHECK(buffer.data() == data);
    for (int64_t row = 0; row < 2; ++row) {
      char* const at = data + row * buffer.row_stride();
      at[0] = bytes == 1 ? static_cast<char>('a' + row) : at[0];
      at[bytes - 1] = at[0];
      CHECK(at[0] == 'a' + row);
    }
  }
  CHECK(buffer.committed_bytes() == 2 << 20);
  const std::string full = error_of<OutOfMemory>([&] { buffer.commit(kTooMuch); });
  CHECK(full.find("out of memory") != std::string::npos);
  CHECK(buffer.committed_bytes() == 2 << 20);
  CHECK(data[0] == 'a');
  buffer.release();
  buffer.commit(1);
  CHECK(data[0] == 0);  // new pages: the old ones went back to the system
}

TEST_CASE("VirtualBuffer: more addresses than there are is an error, not a crash") {
  CHECK(error_of([] { VirtualBuffer(host_address_space(), 1, int64_t{1} << 60); }).find("cannot reserve") !=
        std::string::npos);
}

#if ZIGZAG_WITH_CUDA
TEST_CASE("VirtualBuffer on the GPU: grows without moving, keeps its contents, fails whole and gives memory back") {
  if (no_device()) return;
  CHECK(error_of([] { device_address_space(1000); }).find("there is no CUDA device 1000") != std::string::npos);
  const auto free_bytes = [] { return device_address_space(0)->free_bytes(); };
  const int64_t free_before = free_bytes();
  {
    VirtualBuffer buffer(device_address_space(0), 2, kTerabyte / 4);
    const int64_t page = buffer.page_bytes();
    CHECK(page >= 1 << 16);
    buffer.commit(1);
    CHECK(buffer.committed_bytes() == 2 * page);
    char* const second_row = buffer.data() + buffer.row_stride();
    CHECK_CUDA(cudaMemset(second_row, 7, static_cast<size_t>(page)));
    buffer.commit(16 * page);
    CHECK_CUDA(cudaMemset(second_row + page, 8, static_cast<size_t>(15 * page)));
    std::vector<unsigned char> host(static_cast<size_t>(16 * page));
    CHECK_CUDA(cudaMemcpy(host.data(), second_row, host.size(), cudaMemcpyDeviceToHost));
    CHECK(host.front() == 7);
    CHECK(host[static_cast<size_t>(page - 1)] == 7);
    CHECK(host[static_cast<size_t>(page)] == 8);
    CHECK(host.back() == 8);
    CHECK(error_of<OutOfMemory>([&] { buffer.commit(kTerabyte / 4); }).find("out of memory") != std::string::npos);
    CHECK(buffer.committed_bytes() == 32 * page);
    CHECK_CUDA(cudaMemcpy(host.data(), second_row, host.size(), cudaMemcpyDeviceToHost));
    CHECK(host.back() == 8);
    CHECK(free_bytes() <= free_before - 32 * page);
    buffer.release();
    CHECK(free_bytes() > free_before - 32 * page);
    buffer.commit(page);
    CHECK_CUDA(cudaMemset(second_row, 9, static_cast<size_t>(page)));
    CHECK_CUDA(cudaDeviceSynchronize());
  }
}
#endif
