// A buffer that grows where it stands: addresses for the largest size are reserved at once and never change, memory
// comes page by page. Pointers and captured graphs stay valid, nothing is copied, and a short context does not pay for
// a long one.
//
// The buffer is `rows` regions, each from a page of its own, that grow and shrink together or alone. What a row is
// decides the price: memory is rounded up to a page (2 MiB on CUDA) for every row of every buffer.
//
//   cache [batch, slots, heads, head_dim]   one row per batch row: one page at least
//   cache [batch, heads, slots, head_dim]   one row per batch row and head: `heads` pages at least, and as many calls
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

#include "core/error.h"
#include "kv/virtual_memory.h"

namespace zigzag {

// Safe for several threads at once. On the CPU every address of the buffer can be read at any time (zeros where there
// is no memory) and written where it is committed; on CUDA what is not committed can be neither read nor written.
//
// Memory is given back when the device has done all queued work. While a stream capture is under way nothing waits,
// since waiting would invalidate the capture: shrink and release then keep the memory (committed_bytes() says so), and
// what a destroyed buffer had is given back by the next buffer that is made, grows, shrinks or is destroyed outside a
// capture.
class VirtualBuffer {
 public:
  // Reserves rows * row_stride() bytes of addresses in `space`. A row is also a whole number of units of `unit_bytes`
  // (of tokens), so that the buffer is a contiguous array of them. Throws zigzag::Error where a number is < 1 or the
  // addresses do not fit.
  VirtualBuffer(std::unique_ptr<AddressSpace> space, int64_t rows, int64_t row_bytes, int64_t unit_bytes = 1);
  // Longer rows in another space of the same kind and device, which hold what `from` holds. `from` stays as it is and
  // shares its memory on CUDA: release it, and write to the new one only.
  VirtualBuffer(std::unique_ptr<AddressSpace> space, int64_t row_bytes, VirtualBuffer& from);
  ~VirtualBuffer();
  VirtualBuffer(const VirtualBuffer&) = delete;
  VirtualBuffer& operator=(const VirtualBuffer&) = delete;

  // Makes the first `bytes` (up to row_stride()) of every row, or of one, usable, whole pages at a time; what they hold
  // stays. Fewer bytes than before change nothing. Throws OutOfMemory with the bytes wanted and free, and leaves the
  // buffer as it was.
  void commit(int64_t bytes);
  void commit_row(int64_t row, int64_t bytes);
  // What commit(bytes) or commit_row(row, bytes) would take from the free memory.
  int64_t growth(int64_t bytes) const;
  int64_t row_growth(int64_t row, int64_t bytes) const;

  // Gives back the pages of every row, or of one, that lie behind its first `bytes`. The addresses stay reserved.
  // On CUDA up to 15 pages of a row move, unless all go; OutOfMemory where there is no memory for them: that row and
  // those behind it are left as they were.
  void shrink(int64_t bytes);
  void shrink_row(int64_t row, int64_t bytes);
  void release() { shrink(0); }

  char* data() const { return data_; }
  int64_t rows() const { return rows_; }
  int64_t row_bytes() const { return row_bytes_; }
  int64_t row_stride() const { return row_stride_; }  // bytes from row to row: row_bytes in whole pages and units
  int64_t page_bytes() const { return page_; }
  int64_t reserved_bytes() const { return rows_ * row_stride_; }
  int64_t committed_bytes() const { return committed_bytes_; }  // memory in use; never waits
  int64_t committed_row_bytes(int64_t row) const;

 private:
  struct Rows {
    int64_t begin, end;
  };
  Rows one(int64_t row) const;
  int64_t pages(int64_t bytes, const char* call) const;
  int64_t missing(Rows rows, int64_t target) const;
  void grow(Rows rows, int64_t bytes, VirtualBuffer* from);
  void cut(Rows rows, int64_t bytes);

  std::unique_ptr<AddressSpace> space_;
  int64_t rows_, row_bytes_, unit_bytes_, page_, row_stride_ = 0;
  char* data_ = nullptr;
  mutable std::mutex mutex_;        // of what is below and of space_
  std::vector<int64_t> committed_;  // bytes of each row that have memory
  std::atomic<int64_t> committed_bytes_{0};
};

}  // namespace zigzag
