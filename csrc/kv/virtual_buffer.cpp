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

}  // namespace

VirtualBuffer::VirtualBuffer(std::unique_ptr<AddressSpace> space, int64_t rows, int64_t row_bytes, int64_t unit_bytes)
    : space_(std::move(space)), rows_(rows), row_bytes_(row_bytes) {
  constexpr int64_t kMaxBytes = int64_t{1} << 60, kMaxUnit = int64_t{1} << 30;
  ZZ_CHECK(rows >= 1 && row_bytes >= 1, "a virtual buffer needs rows >= 1 and row_bytes >= 1, got ", rows, " and ",
           row_bytes);
  ZZ_CHECK(unit_bytes >= 1 && unit_bytes <= kMaxUnit, "unit_bytes must be 1 to 2^30, got ", unit_bytes);
  int64_t bytes = 0;
  ZZ_CHECK(row_bytes <= kMaxBytes &&
               !__builtin_mul_overflow(rows, row_stride_ = round_up(row_bytes, std::lcm(page_bytes(), unit_bytes)),
                                       &bytes) &&
               bytes <= kMaxBytes,
           "a virtual buffer reserves at most 2^60 bytes; got ", rows, " rows of ", row_bytes);
  data_ = space_->reserve(bytes);
}

// A failure here means that the device is lost or the process is ending, and the memory goes with it.
VirtualBuffer::~VirtualBuffer() {
  try {
    release();
  } catch (const Error&) {
  }
}

void VirtualBuffer::commit(int64_t bytes) {
  ZZ_CHECK(bytes >= 0 && bytes <= row_stride_, "commit takes 0 to ", row_stride_, " bytes per row, got ", bytes);
  const int64_t target = round_up(bytes, page_bytes()), growth = target - committed_row_bytes_;
  if (growth <= 0) return;
  const int64_t wanted = rows_ * growth;
  if (!space_->could_map(wanted)) throw out_of_memory(wanted, 0, space_->free_bytes());
  mapped_.reserve(mapped_.size() + static_cast<std::size_t>(rows_));
  const std::size_t before = mapped_.size();
  try {
    for (int64_t row = 0; row < rows_; ++row) {
      const AddressSpace::Range range{row * row_stride_ + committed_row_bytes_, growth};
      if (!space_->map(range)) throw out_of_memory(wanted, row * growth, space_->free_bytes());
      mapped_.push_back(range);
    }
  } catch (...) {
    const auto first_new = mapped_.begin() + static_cast<std::ptrdiff_t>(before);
    space_->unmap({first_new, mapped_.end()});
    mapped_.erase(first_new, mapped_.end());
    throw;
  }
  committed_row_bytes_ = target;
}

void VirtualBuffer::release() {
  if (!mapped_.empty()) space_->unmap(mapped_);
  mapped_.clear();
  committed_row_bytes_ = 0;
}

#if !ZIGZAG_WITH_CUDA
std::unique_ptr<AddressSpace> device_address_space(int) {
  throw Error("this build of zigzag_ext has no CUDA kernels; rebuild with nvcc on the PATH or ZIGZAG_CUDA=on");
}
#endif

}  // namespace zigzag
