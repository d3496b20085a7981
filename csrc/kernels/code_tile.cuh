// A tile of 16 quantised keys or values in shared memory, and how it gets there: cached codes by cp.async, 16 bytes at
// a time, new tokens encoded on the way.
#pragma once

#include "kernels/attend_keys.cuh"
#include "kv/codec_cuda.cuh"

namespace zigzag::attend {

// Rows of `kBytes` bytes at a pitch of a power of two, their 16-byte pieces swizzled so that neither 8 rows at one
// piece (keys) nor every second row at two neighbouring pieces (values) meet on a bank.
template <class Format_, int kHeadDim>
struct CodeTile {
  using Format = Format_;
  static constexpr int kRowBytes = kHeadDim * Format::kBits / 8;
  static constexpr int kChunks = kRowBytes / 16;
  static constexpr int kPitch = kRowBytes > 128 ? 256 : kRowBytes > 64 ? 128 : kRowBytes > 32 ? 64 : 32;
  static constexpr int kBytes = kTileKeys * kPitch;
  static_assert(kRowBytes % 16 == 0 && kRowBytes <= 256);

  // Byte `byte` of row `row`.
  __device__ __forceinline__ static int place(int row, int byte) {
    int turn = row % 8;                                                   // whole 128-byte lines
    if constexpr (kPitch == 64) turn = row / 2 % 4 | (row / 2 % 2) << 2;  // two rows a line
    if constexpr (kPitch == 32) turn = row / 4 % 2;                       // four rows a line
    return (row * kPitch + byte) ^ (turn << 4);
  }
};

// Codes and scales of the keys or of the values of one (batch, KV head).
struct CodeSource {
  char* codes;
  float* scale;
  int64_t step, scale_step;  // from slot to slot, in bytes and in floats
};

__device__ __forceinline__ CodeSource code_source(const AttentionParams& p, const Keys& keys, bool is_v) {
  const KvStore& store = is_v ? p.v_store : p.k_store;
  float* scale = store.scale + keys.batch * store.scale_stride.batch + keys.kv_head * store.scale_stride.head;
  return {const_cast<char*>(is_v ? keys.v : keys.k), scale, is_v ? p.v_cache_stride.token : p.k_cache_stride.token,
          store.scale_stride.token};
}

// Column `column` of the chunk as codes, one warp together: K after RoPE, or V.
template <class Format, class Element>
struct NewVector {
  EncodedPiece<Format> codes;
  QuadPair quads;
  bool held;  // whether this lane holds a piece

  template <class S>
  __device__ __forceinline__ static NewVector load(const AttentionParams& p, const Keys& keys, bool is_v, int column) {
    const int pair = threadIdx.x % 32, turning = is_v ? 0 : turning_pairs(p);
    NewVector vector;
    vector.quads = quads_of(pair, turning);
    vector.held = pair < S::kChunks;
    uint4 piece = make_uint4(0, 0, 0, 0);
    if (vector.held) {
      const int64_t step = is_v ? p.v_new_stride.token : p.k_new_stride.token;
      piece = load_pair(new_tokens(p, keys, is_v) + 2 * column * step, vector.quads);
      if (pair < turning) {
        Turn<Element> turn;
        turn.load(p, keys.batch, column, vector.quads);
        piece = turn.apply(p, piece);
      }
    }
    __syncwarp();
    vector.codes = EncodedPiece<Format>::template encode<Element>(piece);
    return vector;
  }

  // Where the codes of a quad lie in their vector.
  __device__ __forceinline__ static int byte_of(int quad) { return quad * Format::kBits / 2; }

  __device__ __forceinline__ void append(const CodeSource& to, int slot) const {
    char* row = to.codes + slot * to.step;
    if (held) {
      *reinterpret_cast<Quad<Format>*>(row + byte_of(quads.low)) = codes.low;
      *reinterpret_cast<Quad<Format>*>(row + byte_of(quads.high)) = codes.high;
    }
    if (threadIdx.x % 32 == 0) to.scale[slot * to.scale_step] = codes.scale;
  }

  template <class Tile>
  __device__ __forceinline__ void stage(char* tile, float* scales, int row) const {
    if (held) {
      *reinterpret_cast<Quad<Format>*>(tile + Tile::place(row, byte_of(quads.low))) = codes.low;
      *reinterpret_cast<Quad<Format>*>(tile + Tile::place(row, byte_of(quads.high))) = codes.high;
    }
    if (threadIdx.x % 32 == 0) scales[row] = codes.scale;
  }
};

// Starts the copy of `rows` cached vectors from slot `slot` on; the rest of the tile becomes zeros, but for rows from
// `encoded` to `encoded_end`, which stay as they are. Every row is copied where `kWhole`.
template <class Tile, bool kWhole>
__device__ __forceinline__ void load_codes(const CodeSource& from, int slot, int rows, int encoded, int encoded_end,
                                           uint32_t tile) {
  constexpr int kPieces = kTileKeys * Tile::kChunks;
#pragma unroll
  for (int i = 0; i < kPieces; i += 32) {
    const int piece = i + threadIdx.x % 32, row = piece / Tile::kChunks, byte = piece % Tile::kChunks * 16;
    if (kPieces % 32 != 0 && piece >= kPieces) break;
    const uint32_t to = tile + Tile::place(row, byte);
    const char* source = from.codes + static_cast<int64_t>(slot + row) * from.step + byte;
    if constexpr (kWhole) {
      device::cp_async_16(to, source, true);
    } else {
      if (row >= encoded && row < encoded_end) continue;
      device::cp_async_16_reused(to, row < rows ? source : from.codes, row < rows);
    }
  }
}

// f(tile type, is_v) for the keys and for the values; where their formats are the same, as one piece of code.
template <class S, class F>
__device__ __forceinline__ void for_keys_and_values(const F& f) {
  if constexpr (std::is_same_v<typename S::KTile, typename S::VTile>) {
#pragma unroll 1
    for (int is_v = 0; is_v < 2; ++is_v) f(typename S::KTile{}, is_v != 0);
  } else {
    f(typename S::KTile{}, false);
    f(typename S::VTile{}, true);
  }
}

// Starts the copy of a tile of the list: codes of keys, codes of values, then 16 scales of each. Keys that are neither
// cached nor new become zeros of scale zero: what was never written may be anything.
template <class S>
__device__ __forceinline__ void load_code_tile(const AttentionParams& p, const Keys& keys, int item, uint32_t stage,
                                               char* stage_pointer) {
  const int tile = item * kTileKeys, lane = threadIdx.x % 32;
  const uint32_t v_stage = stage + S::KTile::kBytes, scales = v_stage + S::VTile::kBytes;
  const CodeSource k = code_source(p, keys, false), v = code_source(p, keys, true);
  const int cached = max(0, min(kTileKeys, keys.used - tile));  // rows of the tile that the cache holds
  const float* scale = lane < kTileKeys ? k.scale : v.scale;
  const int64_t scale_step = lane < kTileKeys ? k.scale_step : v.scale_step;
  const int row = lane % kTileKeys;
  if (cached == kTileKeys) {
    load_codes<typename S::KTile, true>(k, tile, kTileKeys, 0, 0, stage);
    load_codes<typename S::VTile, true>(v, tile, kTileKeys, 0, 0, v_stage);
    device::cp_async_4(scales + 4 * lane, scale + (tile + row) * scale_step, true);
    return;
  }
  device::grid_dependency_wait();  // the new tokens may come from the kernel in front
  const int begin = max(0, keys.stored - tile), end = min(kTileKeys, keys.stored + keys.listed - tile);
  load_codes<typename S::KTile, false>(k, tile, cached, begin, end, stage);
  load_codes<typename S::VTile, false>(v, tile, cached, begin, end, v_stage);
  if (row < begin || row >= end) {
    device::cp_async_4(scales + 4 * lane, row < cached ? scale + (tile + row) * scale_step : scale, row < cached);
  }
  __syncwarp();
#pragma unroll 1
  for (int i = begin; i < end; ++i) {
    const int column = keys.first + tile + i - keys.stored;
    for_keys_and_values<S>([&](auto tile_type, bool is_v) {
      using Tile = decltype(tile_type);
      float* scale_pointer = reinterpret_cast<float*>(stage_pointer + S::KTile::kBytes + S::VTile::kBytes);
      NewVector<typename Tile::Format, typename S::Element>::template load<S>(p, keys, is_v, column)
          .template stage<Tile>(stage_pointer + (is_v ? S::KTile::kBytes : 0), scale_pointer + (is_v ? kTileKeys : 0),
                                i);
    });
  }
}

// append_new_tokens for quantised caches: a warp per token.
template <class S>
__device__ __forceinline__ void append_codes(const AttentionParams& p, const Keys& keys, int thread, int count) {
  const RingLayout layout = ring_layout(p);
#pragma unroll 1
  for (int token = thread / 32; token < keys.fresh; token += count / 32) {
    const int position = keys.length + token, slot = layout.slot(position);
    if (slot >= p.slots || !layout.survives(position, keys.length + keys.fresh)) continue;
    for_keys_and_values<S>([&](auto tile_type, bool is_v) {
      using Format = typename decltype(tile_type)::Format;
      NewVector<Format, typename S::Element>::template load<S>(p, keys, is_v, keys.first + token)
          .append(code_source(p, keys, is_v), slot);
    });
  }
}

}  // namespace zigzag::attend
