// Sizes that the decode kernels and their launches share: what a block holds, for every shape that has a kernel.
#pragma once

#include "core/types.h"

namespace zigzag::attend {

inline constexpr int kTileKeys = 16;       // keys of one warp step: M of mma.m16n8k16
inline constexpr int kMaxWarps = 8;        // of a block
inline constexpr int kMaxCluster = 16;     // more than 8 is beyond what CUDA promises: asked for and checked at launch
inline constexpr int kMaxRingCluster = 8;  // of decode_stream, whose merge is on the critical path
inline constexpr int kMaxSpread = 16;      // clusters that share a row group
inline constexpr int kMaxBlocks = 320;     // of decode_full: two per SM of the largest GPU
inline constexpr int kMaxSharedBytes = 227 * 1024;  // what a block may have on the GPUs that allow most

// Bytes of a row in shared memory, a power of two: see swizzled() in keys.cuh.
constexpr int row_pitch(int bytes) {
  int pitch = 32;
  while (pitch < bytes) pitch *= 2;
  return pitch;
}

// Row tiles of a block that serves `rows` query rows, or those it takes of them at a time. Of wide heads one: the
// output of two would not fit in the registers of a warp.
constexpr int row_tiles(int head_dim, int rows) { return rows > 8 && head_dim <= 256 ? 2 : 1; }

// What a block of a decode kernel works on: tiles of kTileKeys keys and values, 8 query rows per row tile.
struct BlockShape {
  int head_dim;
  int row_tiles;
  KvFormats formats;

  constexpr bool has_codes() const { return formats.k != KvFormat::kPlain || formats.v != KvFormat::kPlain; }
  constexpr int rows() const { return 8 * row_tiles; }
  constexpr int row_bytes() const { return row_pitch(2 * head_dim); }  // of 16-bit elements

  // K tile and V tile; of codes with a float32 scale per vector.
  constexpr int stage_bytes() const {
    if (!has_codes()) return 2 * kTileKeys * row_bytes();
    const int64_t k = vector_bytes(formats.k, 2, head_dim), v = vector_bytes(formats.v, 2, head_dim);
    return kTileKeys * (row_pitch(static_cast<int>(k)) + row_pitch(static_cast<int>(v)) + 2 * 4);
  }

  // Ring depth per warp: one stage in use, the rest in flight. 64 to 100 KB in flight per SM saturate the memory of an
  // H100. Of codes as deep as shared memory of 8 warps allows beside queries and partial results, from 3 to 6 stages.
  constexpr int stages() const {
    if (!has_codes()) return head_dim > 64 ? 2 : 4;
    const int free = kMaxSharedBytes / kMaxWarps - rows() * (row_bytes() + 4 * (head_dim + 4) + 8);
    const int fit = free / stage_bytes();
    return fit < 3 ? 3 : fit > 6 ? 6 : fit;
  }

  // A cluster shares the output out by units: 32 floats of a row, which are what 8 lanes hold of two steps. A row has a
  // power of two of them, which keeps their addresses cheap; the last ones may be empty.
  constexpr int used_units() const { return (head_dim / 16 + 1) / 2; }
  constexpr int row_units() const {
    int units = 2;
    while (units < used_units()) units *= 2;
    return units;
  }
};

// Byte offsets in dynamic shared memory. What a block has for itself where it merges alone, it has for what the blocks
// of its cluster send where it merges with them.
struct SharedLayout {
  int stages;   // stages of a warp's ring that exist: fewer than BlockShape::stages() where a warp never has more tiles
  int ring;     // [warps][stages] K tile, V tile; before it, at 0, [warps][rows] queries
  int partial;  // block: [warps][rows][head_dim + 4] fp32, O of each warp; cluster: [units of a block][sources][32]
  int norm;     // {max, sum}; block: [warps][rows]; cluster: [units of a block][sources]
  int total;
};

constexpr SharedLayout shared_layout(const BlockShape& block, int warps, int tiles_per_warp, int cluster) {
  const int units = (block.rows() * block.row_units() + cluster - 1) / cluster, sources = warps * cluster;
  SharedLayout layout = {};
  layout.stages = tiles_per_warp < block.stages() ? tiles_per_warp : block.stages();
  layout.ring = warps * block.rows() * block.row_bytes();
  layout.partial = layout.ring + warps * layout.stages * block.stage_bytes();
  layout.norm =
      layout.partial + (cluster > 1 ? units * sources * 128 : warps * block.rows() * (block.head_dim + 4) * 4);
  layout.total = layout.norm + (cluster > 1 ? units * sources : warps * block.rows()) * 8;
  return layout;
}

}  // namespace zigzag::attend
