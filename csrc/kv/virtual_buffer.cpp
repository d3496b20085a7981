#include "kv/virtual_buffer.h"

#include <algorithm>
#include <numeric>
#include <utility>

namespace zigzag {
namespace {

int64_t round_up(int64_t bytes, int64_t page) { return (bytes + page - 1) / page * page; }

OutOfMemory out_of_memory(int64_t wanted, int64_t given, int64_t free) {
  return OutOfMemory(concat("out of memory: the buffer grows by ", wanted, " bytes, ", given,
                            " of them were found and ", free, " bytes are free now; it is left as it was"));
}

// Spaces of buffers that are gone and whose device could not be waited for. Never destroyed: at the end of the process
// the memory goes with it.
struct Retired {
  std::mutex mutex;
  std::vector<std::unique_ptr<AddressSpace>> spaces;
  std::atomic<bool> some{false};

  static Retired& instance() {
    static Retired* const retired = new Retired;
    return *retired;
  }

  void add(std::unique_ptr<AddressSpace> space) {
    const std::lock_guard<std::mutex> lock(mutex);
    spaces.push_back(std::move(space));
    some = true;
  }

  // Outside all locks of buffers: it may wait for devices.
  void drain() {
    if (!some) return;
    std::vector<std::unique_ptr<AddressSpace>> found;
    {
      const std::lock_guard<std::mutex> lock(mutex);
      found.swap(spaces);
      some = false;
    }
    for (std::unique_ptr<AddressSpace>& space : found) dispose(std::move(space));
  }

  void dispose(std::unique_ptr<AddressSpace> space) {
    try {
      if (!space->wait()) add(std::move(space));
    } catch (const Error&) {  // the device is lost or the process is ending, and the memory goes with it
    }
  }
};

}  // namespace

VirtualBuffer::VirtualBuffer(std::unique_ptr<AddressSpace> space, int64_t rows, int64_t row_bytes, int64_t unit_bytes)
    : space_(std::move(space)),
      rows_(rows),
      row_bytes_(row_bytes),
      unit_bytes_(unit_bytes),
      page_(space_->page_bytes()) {
  constexpr int64_t kMaxBytes = int64_t{1} << 60, kMaxUnit = int64_t{1} << 30;
  ZZ_CHECK(rows >= 1 && row_bytes >= 1, "a virtual buffer needs rows >= 1 and row_bytes >= 1, got ", rows, " and ",
           row_bytes);
  ZZ_CHECK(unit_bytes >= 1 && unit_bytes <= kMaxUnit, "unit_bytes must be 1 to 2^30, got ", unit_bytes);
  int64_t bytes = 0;
  ZZ_CHECK(row_bytes <= kMaxBytes &&
               !__builtin_mul_overflow(rows, row_stride_ = round_up(row_bytes, std::lcm(page_, unit_bytes)), &bytes) &&
               bytes <= kMaxBytes,
           "a virtual buffer reserves at most 2^60 bytes; got ", rows, " rows of ", row_bytes);
  Retired::instance().drain();
  data_ = space_->reserve(bytes, rows);
  committed_.resize(static_cast<std::size_t>(rows));
}

VirtualBuffer::VirtualBuffer(std::unique_ptr<AddressSpace> space, int64_t row_bytes, VirtualBuffer& from)
    : VirtualBuffer(std::move(space), from.rows_, row_bytes, from.unit_bytes_) {
  ZZ_CHECK(row_stride_ >= from.row_stride_, "a buffer is extended to at least its ", from.row_bytes_,
           " bytes per row, got ", row_bytes);
  const std::lock_guard<std::mutex> lock(from.mutex_);
  for (int64_t row = 0; row < rows_; ++row) grow({row, row + 1}, from.committed_[static_cast<std::size_t>(row)], &from);
}

VirtualBuffer::~VirtualBuffer() {
  if (committed_bytes_ > 0) Retired::instance().dispose(std::move(space_));
  Retired::instance().drain();
}

VirtualBuffer::Rows VirtualBuffer::one(int64_t row) const {
  ZZ_CHECK(row >= 0 && row < rows_, "the buffer has rows 0 to ", rows_ - 1, ", got ", row);
  return {row, row + 1};
}

// `bytes` as whole pages, if a row has that many.
int64_t VirtualBuffer::pages(int64_t bytes, const char* call) const {
  ZZ_CHECK(bytes >= 0 && bytes <= row_stride_, call, " takes 0 to ", row_stride_, " bytes per row, got ", bytes);
  return round_up(bytes, page_);
}

int64_t VirtualBuffer::missing(Rows rows, int64_t target) const {
  int64_t bytes = 0;
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    bytes += std::max<int64_t>(0, target - committed_[static_cast<std::size_t>(row)]);
  }
  return bytes;
}

void VirtualBuffer::commit(int64_t bytes) { grow({0, rows_}, bytes, nullptr); }
void VirtualBuffer::commit_row(int64_t row, int64_t bytes) { grow(one(row), bytes, nullptr); }
void VirtualBuffer::shrink(int64_t bytes) { cut({0, rows_}, bytes); }
void VirtualBuffer::shrink_row(int64_t row, int64_t bytes) { cut(one(row), bytes); }

int64_t VirtualBuffer::growth(int64_t bytes) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return missing({0, rows_}, pages(bytes, "growth"));
}

int64_t VirtualBuffer::row_growth(int64_t row, int64_t bytes) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return missing(one(row), pages(bytes, "row_growth"));
}

int64_t VirtualBuffer::committed_row_bytes(int64_t row) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return committed_[static_cast<std::size_t>(one(row).begin)];
}

// Rows to at least `bytes`; with what those of `from` hold, where this buffer has nothing yet.
void VirtualBuffer::grow(Rows rows, int64_t bytes, VirtualBuffer* from) {
  const int64_t target = pages(bytes, "commit");
  Retired::instance().drain();
  const std::lock_guard<std::mutex> lock(mutex_);
  const int64_t wanted = missing(rows, target);
  if (wanted == 0) return;
  if (!space_->could_map(wanted)) throw out_of_memory(wanted, 0, space_->free_bytes());
  std::vector<AddressSpace::Range> added;
  added.reserve(static_cast<std::size_t>(rows.end - rows.begin));
  try {
    for (int64_t row = rows.begin, given = 0; row < rows.end; ++row) {
      const int64_t held = committed_[static_cast<std::size_t>(row)];
      if (target <= held) continue;
      const AddressSpace::Range range{row * row_stride_ + held, target - held};
      const bool found =
          from != nullptr ? space_->map_same(range, *from->space_, row * from->row_stride_) : space_->map(range);
      if (!found) throw out_of_memory(wanted, given, space_->free_bytes());
      added.push_back(range);
      given += range.bytes;
    }
  } catch (...) {
    for (const AddressSpace::Range& range : added) space_->unmap(range);
    throw;
  }
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    int64_t& held = committed_[static_cast<std::size_t>(row)];
    held = std::max(held, target);
  }
  committed_bytes_ += wanted;
}

void VirtualBuffer::cut(Rows rows, int64_t bytes) {
  const int64_t target = pages(bytes, "shrink");
  Retired::instance().drain();
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto held = [&](int64_t row) -> int64_t& { return committed_[static_cast<std::size_t>(row)]; };
  int64_t surplus = 0;
  for (int64_t row = rows.begin; row < rows.end; ++row) surplus += std::max<int64_t>(0, held(row) - target);
  if (surplus == 0 || !space_->wait()) return;
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    if (held(row) <= target) continue;
    const int64_t given_back = held(row) - target;
    held(row) = target;  // forget first, release after
    committed_bytes_ -= given_back;
    try {
      space_->unmap({row * row_stride_ + target, given_back});
    } catch (const OutOfMemory&) {  // nothing was taken away
      held(row) += given_back;
      committed_bytes_ += given_back;
      throw;
    }
  }
}

#if !ZIGZAG_WITH_CUDA
std::unique_ptr<AddressSpace> device_address_space(int) {
  throw Error("this build of zigzag_ext has no CUDA kernels; rebuild with nvcc on the PATH or ZIGZAG_CUDA=on");
}

void watch_captures(int, const std::vector<void*>&) {}
#endif

}  // namespace zigzag
