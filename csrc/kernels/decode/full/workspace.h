// Scratch of merges through memory: counters that tell the last block of a row group to merge, then partial results.
//
// Everything is indexed by block, not by row group: the layout depends on head_dim alone, so calls of different
// geometry may share one workspace. Counters are zero before and after every call.
#pragma once

#include <cstdint>

#include "kernels/decode/geometry.h"

namespace zigzag::decode_full {

using attend::kMaxBlocks;

// Per block, or per warp of half of the blocks: where several clusters share a row group, its warps count.
inline constexpr int64_t kCounterBytes = 8192;
static_assert(kMaxBlocks / 2 * attend::kMaxWarps * 4 <= kCounterBytes && kMaxBlocks * 4 <= kCounterBytes);

// One partial result: [rows][head_dim] fp32, then [rows] {max, sum}.
constexpr int64_t partial_bytes(int rows, int head_dim) { return static_cast<int64_t>(rows) * (head_dim + 2) * 4; }

// Query rows of a block, at most.
constexpr int max_rows(int head_dim) { return 8 * attend::row_tiles(head_dim, 16); }

// A block has at most two row groups that it shares with other blocks: the one it begins in and the one it ends in.
// (Clusters need less: two blocks or more have one row group together.)
constexpr int64_t workspace_bytes(int head_dim) {
  return kCounterBytes + 2 * kMaxBlocks * partial_bytes(max_rows(head_dim), head_dim);
}

}  // namespace zigzag::decode_full
