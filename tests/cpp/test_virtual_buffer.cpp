// Buffers that grow where they stand: on the CPU, and over memory that fails on purpose.
#include <doctest/doctest.h>
#include <sys/resource.h>

#include <cstdint>
#include <map>
#include <memory>
#include <numeric>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "error_text.h"
#include "kv/virtual_buffer.h"

namespace {

using namespace zigzag;
using zigzag::testing::error_of;

constexpr int64_t kTerabyte = int64_t{1} << 40;
constexpr int64_t kTooMuch = 8 * kTerabyte;  // more than any machine has free, less than it has addresses

// Pages of 16 bytes that exist on paper, and a budget of them.
struct Ledger {
  int64_t free = 1000, mapped = 0;
  int maps_until_failure = -1;  // that many succeed; -1: all
  bool capturing = false;       // a stream capture is under way
  bool no_cut = false;          // unmap() finds no memory
  int waits = 0, unmaps_without_wait = 0;
  std::set<int64_t> pages;          // offsets
  std::map<int64_t, int64_t> text;  // offset of a page -> what it holds
};

class PaperSpace final : public AddressSpace {
 public:
  explicit PaperSpace(Ledger& ledger) : ledger_(ledger) {}
  ~PaperSpace() override {
    ledger_.pages.clear();
    ledger_.mapped = 0;
  }
  int64_t page_bytes() const override { return 16; }
  int64_t free_bytes() const override { return ledger_.free; }
  bool could_map(int64_t bytes) const override { return bytes <= ledger_.free; }
  char* reserve(int64_t bytes, int64_t) override {
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
    for (int64_t at = range.offset; at < range.offset + range.bytes; at += 16) CHECK(ledger_.pages.insert(at).second);
    ledger_.mapped += range.bytes;
    waited_ = false;
    return true;
  }
  bool map_same(const Range& range, AddressSpace& from, int64_t from_offset) override {
    if (!map(range)) return false;
    Ledger& other = static_cast<PaperSpace&>(from).ledger_;
    for (int64_t at = 0; at < range.bytes; at += 16) {
      CHECK(other.pages.count(from_offset + at) == 1);
      ledger_.text[range.offset + at] = other.text[from_offset + at];
    }
    return true;
  }
  bool wait() override {
    if (ledger_.capturing) return false;
    ++ledger_.waits;
    return waited_ = true;
  }
  void unmap(const Range& range) override {
    if (ledger_.no_cut) throw OutOfMemory("no memory to move pages");
    const bool taken_back = ledger_.maps_until_failure == 0;  // nothing has used what was just mapped
    if (!waited_ && !taken_back) ++ledger_.unmaps_without_wait;
    for (int64_t at = range.offset; at < range.offset + range.bytes; at += 16) CHECK(ledger_.pages.erase(at) == 1);
    ledger_.mapped -= range.bytes;
  }

 private:
  Ledger& ledger_;
  int64_t reserved_ = 0;
  bool waited_ = false;  // since the last map()
};

std::unique_ptr<PaperSpace> paper(Ledger& ledger) { return std::make_unique<PaperSpace>(ledger); }

}  // namespace

TEST_CASE("VirtualBuffer: rows grow together, in whole pages, each from a page of its own") {
  Ledger ledger;
  {
    VirtualBuffer buffer(paper(ledger), 3, 50);
    CHECK(buffer.row_stride() == 64);
    CHECK(buffer.reserved_bytes() == 192);
    CHECK(ledger.mapped == 0);
    buffer.commit(0);
    CHECK(ledger.mapped == 0);
    CHECK(buffer.growth(17) == 96);
    buffer.commit(17);
    CHECK(ledger.pages == std::set<int64_t>{0, 16, 64, 80, 128, 144});
    CHECK(buffer.committed_row_bytes(2) == 32);
    CHECK(buffer.committed_bytes() == 96);
    buffer.commit(32);
    buffer.commit(3);
    CHECK(ledger.mapped == 96);
    buffer.commit(50);
    CHECK(ledger.pages.count(96) + ledger.pages.count(112) == 2);
    CHECK(ledger.mapped == 192);
    buffer.release();
    CHECK(ledger.mapped == 0);
    CHECK(buffer.committed_bytes() == 0);
    buffer.commit(1);
    CHECK(ledger.mapped == 48);
  }
  CHECK(ledger.mapped == 0);  // the destructor gives everything back
  CHECK(ledger.unmaps_without_wait == 0);
}

TEST_CASE("VirtualBuffer: a row grows, shrinks and goes alone") {
  Ledger ledger;
  VirtualBuffer buffer(paper(ledger), 3, 64);
  buffer.commit_row(1, 33);
  CHECK(ledger.pages == std::set<int64_t>{64, 80, 96});
  CHECK(buffer.committed_row_bytes(0) == 0);
  CHECK(buffer.committed_row_bytes(1) == 48);
  CHECK(buffer.growth(32) == 64);  // of the two others
  CHECK(buffer.row_growth(1, 64) == 16);
  CHECK(buffer.row_growth(1, 5) == 0);
  buffer.commit(32);
  CHECK(ledger.pages == std::set<int64_t>{0, 16, 64, 80, 96, 128, 144});
  CHECK(buffer.committed_bytes() == 112);
  ledger.no_cut = true;
  CHECK(error_of<OutOfMemory>([&] { buffer.shrink(17); }) == "no memory to move pages");
  CHECK(buffer.committed_bytes() == 112);
  ledger.no_cut = false;
  buffer.shrink(17);
  CHECK(ledger.pages == std::set<int64_t>{0, 16, 64, 80, 128, 144});
  buffer.shrink_row(1, 16);
  CHECK(ledger.pages == std::set<int64_t>{0, 16, 64, 128, 144});
  buffer.shrink_row(1, 0);
  CHECK(ledger.pages == std::set<int64_t>{0, 16, 128, 144});
  CHECK(buffer.committed_bytes() == 64);
  const int waits = ledger.waits;
  buffer.shrink_row(1, 0);
  buffer.shrink(64);
  CHECK(ledger.waits == waits);  // nothing to give back, nothing to wait for
  CHECK(ledger.unmaps_without_wait == 0);
  for (const int64_t row : {-1, 3}) {
    CHECK(error_of([&] { buffer.commit_row(row, 1); }) == concat("the buffer has rows 0 to 2, got ", row));
    CHECK(error_of([&] { buffer.shrink_row(row, 1); }).find("rows 0 to 2") != std::string::npos);
  }
}

TEST_CASE("VirtualBuffer: extended to longer rows it holds the same, and a failure leaves the old one") {
  Ledger before, after;
  VirtualBuffer buffer(paper(before), 2, 64);
  buffer.commit_row(0, 16);
  buffer.commit_row(1, 48);
  before.text = {{0, 7}, {64, 8}, {96, 9}};
  after.maps_until_failure = 1;
  CHECK(error_of<OutOfMemory>([&] { VirtualBuffer(paper(after), 128, buffer); }).find("grows by") != std::string::npos);
  CHECK(after.mapped == 0);
  CHECK(before.mapped == 64);
  after.maps_until_failure = -1;
  const VirtualBuffer longer(paper(after), 128, buffer);
  CHECK(longer.row_stride() == 128);
  CHECK(after.pages == std::set<int64_t>{0, 128, 144, 160});
  CHECK(after.text[0] + after.text[128] + after.text[160] == 7 + 8 + 9);
  CHECK(longer.committed_bytes() == 64);
  CHECK(before.mapped == 64);
  Ledger third;
  CHECK(error_of([&] { VirtualBuffer(paper(third), 48, buffer); }).find("at least its 64 bytes") != std::string::npos);
}

TEST_CASE("VirtualBuffer: during a stream capture nothing waits, memory is kept and goes later") {
  Ledger live, gone, other;
  VirtualBuffer buffer(paper(live), 1, 64);
  buffer.commit(32);
  live.capturing = gone.capturing = true;
  {
    VirtualBuffer dying(paper(gone), 1, 64);
    dying.commit(64);
  }
  buffer.release();
  CHECK(buffer.committed_bytes() == 32);
  buffer.commit(48);  // growing needs no wait
  CHECK(live.mapped == 48);
  CHECK(gone.mapped == 64);
  gone.capturing = live.capturing = false;
  VirtualBuffer next(paper(other), 1, 64);
  CHECK(gone.mapped == 0);
  CHECK(gone.waits == 1);
  buffer.release();
  CHECK(live.mapped == 0);
}

TEST_CASE("VirtualBuffer: many threads grow and release one buffer") {
  Ledger ledger;
  ledger.free = 1 << 30;
  VirtualBuffer buffer(paper(ledger), 4, 4096);
  std::vector<std::thread> threads;
  for (int thread = 0; thread < 8; ++thread) {
    threads.emplace_back([&, thread] {
      for (int turn = 0; turn < 200; ++turn) {
        buffer.commit(16 * (1 + (turn * 7 + thread) % 256));
        buffer.commit_row(thread % 4, 4096);
        if (turn % 3 == 0) buffer.shrink_row((thread + 1) % 4, 160);
        if (turn % 5 == 0) buffer.release();
        CHECK(buffer.committed_bytes() <= 4 * 4096);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(ledger.mapped == buffer.committed_bytes());
  buffer.release();
  CHECK(ledger.mapped == 0);
}

TEST_CASE("VirtualBuffer: out of memory leaves it as it was") {
  Ledger ledger;
  VirtualBuffer buffer(paper(ledger), 3, 1 << 20);
  buffer.commit(16);
  const auto before = ledger.pages;
  CHECK(error_of<OutOfMemory>([&] { buffer.commit(1000); }) ==
        "out of memory: the buffer grows by 2976 bytes, 0 of them were found and 1000 bytes are free now; it is left "
        "as it was");
  ledger.maps_until_failure = 2;  // the third row finds none
  CHECK(error_of<OutOfMemory>([&] { buffer.commit(48); }).find("grows by 96 bytes, 64 of them were found and 1000") !=
        std::string::npos);
  CHECK(ledger.pages == before);
  CHECK(buffer.committed_row_bytes(1) == 16);
  ledger.maps_until_failure = -1;
  buffer.commit(48);
  CHECK(ledger.mapped == 144);
}

TEST_CASE("VirtualBuffer: refuses sizes that make no sense") {
  Ledger ledger;
  const auto make = [&](int64_t rows, int64_t row_bytes) {
    return error_of([&] { VirtualBuffer(paper(ledger), rows, row_bytes); });
  };
  CHECK(make(0, 5).find("got 0 and 5") != std::string::npos);
  CHECK(make(5, -1).find("got 5 and -1") != std::string::npos);
  CHECK(make(1, INT64_MAX).find("at most 2^60 bytes") != std::string::npos);
  CHECK(make(int64_t{1} << 40, int64_t{1} << 40).find("at most 2^60 bytes") != std::string::npos);
  CHECK(error_of([&] { VirtualBuffer(paper(ledger), 1, 5, 0); }).find("unit_bytes") != std::string::npos);
  CHECK(VirtualBuffer(paper(ledger), 2, 50, 24).row_stride() == 96);  // pages of 16, units of 24
  VirtualBuffer buffer(paper(ledger), 1, 50);
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

TEST_CASE("VirtualBuffer on the CPU: what has no memory reads as zeros, also after it was given back") {
  VirtualBuffer buffer(host_address_space(), 3, 1 << 20);
  const auto sum = [&](int64_t row) {
    const char* const at = buffer.data() + row * buffer.row_stride();
    return std::accumulate(at, at + buffer.row_stride(), int64_t{0});
  };
  CHECK(sum(0) + sum(1) + sum(2) == 0);
  const int64_t page = buffer.page_bytes();
  buffer.commit(3 * page);
  for (int64_t row = 0; row < 3; ++row) buffer.data()[row * buffer.row_stride() + 2 * page] = 5;
  buffer.shrink_row(0, 2 * page);
  buffer.shrink_row(1, 0);
  CHECK(sum(0) == 0);
  CHECK(sum(1) == 0);
  CHECK(sum(2) == 5);
  CHECK(buffer.committed_bytes() == 5 * page);
  VirtualBuffer longer(host_address_space(), 2 << 20, buffer);
  CHECK(longer.data()[2 * longer.row_stride() + 2 * page] == 5);
  buffer.release();
  CHECK(sum(2) == 0);
  CHECK(longer.data()[2 * longer.row_stride() + 2 * page] == 5);
}

// A sanitizer's own memory counts too, and it ends the process where it finds none.
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
TEST_CASE("VirtualBuffer on the CPU: the limit of the process that forbids a reservation is named") {
  rlimit before{};
  REQUIRE(getrlimit(RLIMIT_AS, &before) == 0);
  rlimit less = before;
  less.rlim_cur = rlim_t{1} << 40;
  REQUIRE(setrlimit(RLIMIT_AS, &less) == 0);
  const std::string error = error_of<OutOfMemory>([] { VirtualBuffer(host_address_space(), 1, int64_t{1} << 41); });
  VirtualBuffer(host_address_space(), 1, int64_t{1} << 30);
  setrlimit(RLIMIT_AS, &before);
  CHECK(
      error.find("cannot reserve 2199023255552 bytes of addresses: the limit RLIMIT_AS (ulimit -v) is 1099511627776") !=
      std::string::npos);
}
#endif

TEST_CASE("VirtualBuffer: more addresses than there are is an error, not a crash") {
  CHECK(error_of([] { VirtualBuffer(host_address_space(), 1, int64_t{1} << 60); }).find("cannot reserve") !=
        std::string::npos);
}
