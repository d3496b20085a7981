// A buffer that grows where it stands: addresses for the largest size are reserved at once and never change, memory
// comes page by page. Pointers and captured graphs stay valid, nothing is copied, and a short context does not pay for
// a long one.
//
// The buffer is `rows` regions that grow together, each from a page of its own. What a row is decides the price: memory
// is rounded up to a page (2 MiB on CUDA) for every row of every buffer.
//
//   cache [batch, slots, heads, head_dim]   one row per batch row: one page at least
//   cache [batch, heads, slots, head_dim]   one row per batch row and head: `heads` pages at least, and as many calls
#pragma once

#include <memory>
#include <vector>

#include "core/error.h"
#include "kv/virtual_memory.h"

namespace zigzag {

class OutOfMemory : public Error {
 public:
  using Error::Error;
};

// Not for use by several threads at once.
class VirtualBuffer {
 public:
  // Reserves rows * row_stride() bytes of addresses in `space`. A row is also a whole number of units of `unit_bytes`
  // (of tokens), so that the buffer is a contiguous array of them. Throws zigzag::Error where a number is < 1 or the
  // addresses do not fit.
  VirtualBuffer(std::unique_ptr<AddressSpace> space, int64_t rows, int64_t row_bytes, int64_t unit_bytes = 1);
  ~VirtualBuffer();
  VirtualBuffer(const VirtualBuffer&) = delete;
  VirtualBuffer& operator=(const VirtualBuffer&) = delete;

  // Makes the first `bytes` (up to row_stride()) of every row usable, whole pages at a time; what they hold stays.
  // Fewer bytes than before change nothing. Throws OutOfMemory with the bytes wanted and free, and leaves the buffer as
  // it was.
  void commit(int64_t bytes);

  // Gives all memory back, after the device has done all queued work. The addresses stay reserved.
  void release();

  char* data() const { return data_; }
  int64_t rows() const { return rows_; }
  int64_t row_bytes() const { return row_bytes_; }
  int64_t row_stride() const { return row_stride_; }  // bytes from row to row: row_bytes in whole pages and units
  int64_t page_bytes() const { return space_->page_bytes(); }
  int64_t reserved_bytes() const { return rows_ * row_stride_; }
  int64_t committed_bytes() const { return rows_ * committed_row_bytes_; }  // memory in use
  int64_t committed_row_bytes() const { return committed_row_bytes_; }

 private:
  std::unique_ptr<AddressSpace> space_;
  int64_t rows_, row_bytes_, row_stride_ = 0, committed_row_bytes_ = 0;
  char* data_ = nullptr;
  std::vector<AddressSpace::Range> mapped_;
};

}  // namespace zigzag
