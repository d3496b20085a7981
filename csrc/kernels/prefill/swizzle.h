// Where the 16-byte pieces of a tile of 16-bit rows lie in shared memory for warpgroup products: blocks of 64 elements,
// each [rows][128 bytes], the pieces of a row permuted by an XOR with it. That is what the hardware's 128-byte swizzle
// makes of addresses of tiles that begin at a multiple of 1,024 bytes: bits 4 to 6 XOR bits 7 to 9.
#pragma once

#include "core/host_device.h"

namespace zigzag::prefill {

inline constexpr int kSwizzledRowBytes = 128;

// Byte offset of piece `piece` (8 elements) of row `row` in a tile of `rows` rows.
ZZ_HOST_DEVICE constexpr int swizzled_piece(int rows, int row, int piece) {
  return (piece / 8 * rows + row) * kSwizzledRowBytes + (((piece ^ row) & 7) << 4);
}

}  // namespace zigzag::prefill
