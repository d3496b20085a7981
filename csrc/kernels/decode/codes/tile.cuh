// A tile of 16 quantised keys or values in shared memory, and how it gets there: cached codes by cp.async, 16 bytes at
// a time, new tokens that the list holds beside the slots encoded on the way.
#pragma once

#include "kernels/decode/keys.cuh"
#include "kv/codec_cuda.cuh"

namespace zigzag::attend {

// Rows of `kRowBytes` bytes at a pitch of a power of two, their 16-byte pieces swizzled so that 8 rows at one piece,
// which is what ldmatrix reads, do not meet on a bank.
template <class Format_, int kHeadDim>
struct CodeTile {
  using Format = Format_;
  static constexpr int kRowBytes = kHeadDim * Format::kBits / 8;
  static constexpr int kChunks = kRowBytes / 16;
  static constexpr int kPitch = kRowBytes > 128 ? 256 : kRowBytes > 64 ? 128 : kRowBytes > 32 ? 64 : 32;
  static constexpr int kBytes = kTileKeys * kPitch;
  static_assert(kRowBytes % 16 == 0 && kRowBytes <= 256);

  // Byte `byte` of row `row`.
  __device__ __forceinline__ static constexpr int place(int row, int byte) {
    int turn = row % 8;                              // whole 128-byte lines
    if constexpr (kPitch == 64) turn = row / 2 % 4;  // two rows a line
    if constexpr (kPitch == 32) turn = row / 4 % 2;  // four rows a line
    return row * kPitch + (byte ^ (turn << 4));
  }
};

// Codes and scales of the keys or of the values of one (batch, KV head).
struct CodeSource {
  char* codes;
  float* scale;
  int64_t step, scale_step;  // from slot to slot, in bytes and in floats
};

__device__ __forceinline__ CodeSource code_source(const KeyParams& p, const Keys& keys, bool is_v) {
  const KvStore& store = is_v ? p.v_store : p.k_store;
  float* scale = store.scale + keys.cache_row * store.scale_stride.batch + keys.kv_head * store.scale_stride.head;
  return {const_cast<char*>(is_v ? keys.v : keys.k), scale, is_v ? p.v_cache_stride.token : p.k_cache_stride.token,
          store.scale_stride.token};
}

// Codes of a vector, of one warp: eight elements a lane, in two quads.
template <class Format>
struct VectorCodes {
  EncodedPiece<Format> piece;
  QuadPair quads;
  bool held;  // whether this lane holds a piece

  // Where the codes of a quad lie in their vector.
  __device__ __forceinline__ static int byte_of(int quad) { return quad * Format::kBits / 2; }

  __device__ __forceinline__ void append(const CodeSource& to, int slot) const {
    char* row = to.codes + slot * to.step;
    if (held) {
      *reinterpret_cast<Quad<Format>*>(row + byte_of(quads.low)) = piece.low;
      *reinterpret_cast<Quad<Format>*>(row + byte_of(quads.high)) = piece.high;
    }
    if (threadIdx.x % 32 == 0) to.scale[slot * to.scale_step] = piece.scale;
  }

  template <class Tile>
  __device__ __forceinline__ void stage(char* tile, float* scale, int row) const {
    if (held) {
      *reinterpret_cast<Quad<Format>*>(tile + Tile::place(row, byte_of(quads.low))) = piece.low;
      *reinterpret_cast<Quad<Format>*>(tile + Tile::place(row, byte_of(quads.high))) = piece.high;
    }
    if (threadIdx.x % 32 == 0) *scale = piece.scale;
  }
};

// f(tile type, is_v) for the keys or for the values; where their formats are the same, as one piece of code.
template <class S, class F>
__device__ __forceinline__ void with_tile(bool is_v, const F& f) {
  if constexpr (std::is_same_v<typename S::KTile, typename S::VTile>) {
    f(typename S::KTile{}, is_v);
  } else if (is_v) {
    f(typename S::VTile{}, true);
  } else {
    f(typename S::KTile{}, false);
  }
}

// NewPair for quantised caches: a key or value on its way to its codes, of one warp.
template <class S>
struct NewVector {
  static constexpr int kPerToken = 2;
  uint4 data;

  __device__ __forceinline__ static bool held() { return threadIdx.x % 32 < S::kChunks; }
  __device__ __forceinline__ static QuadPair quads(const KeyParams& p, bool is_v) {
    return quads_of(threadIdx.x % 32, is_v ? 0 : turning_pairs(p));
  }

  __device__ __forceinline__ void load(const KeyParams& p, const Keys& keys, int i) {
    const bool is_v = i % 2 != 0;
    const int64_t step = is_v ? p.v_new_stride.token : p.k_new_stride.token;
    data = make_uint4(0, 0, 0, 0);
    if (held()) data = load_pair(new_tokens(p, keys, is_v) + 2 * (keys.first + i / 2) * step, quads(p, is_v));
  }

  template <class Format>
  __device__ __forceinline__ VectorCodes<Format> encode(const KeyParams& p, const Keys& keys, int i) const {
    const QuadPair at = quads(p, i % 2 != 0);
    uint4 turned = data;
    if (i % 2 == 0 && threadIdx.x % 32 < turning_pairs(p)) {
      Turn<typename S::Element> turn;
      turn.load(p, keys.batch, keys.first + i / 2, at);
      turned = turn.apply(p, data);
    }
    __syncwarp();
    return {EncodedPiece<Format>::template encode<typename S::Element>(turned), at, held()};
  }

  __device__ __forceinline__ void append(const KeyParams& p, const Keys& keys, int i, int slot) const {
    with_tile<S>(i % 2 != 0, [&](auto tile_type, bool is_v) {
      encode<typename decltype(tile_type)::Format>(p, keys, i).append(code_source(p, keys, is_v), slot);
    });
  }
};

// The 16-byte pieces of a tile that a lane copies: those of its column in every kTall-th row.
template <class Tile>
struct TilePieces {
  static constexpr int kTall = 32 / Tile::kChunks;
  static_assert(32 % Tile::kChunks == 0 && kTileKeys % kTall == 0);

  __device__ __forceinline__ static int row() { return threadIdx.x % 32 / Tile::kChunks; }
  __device__ __forceinline__ static int byte() { return threadIdx.x % Tile::kChunks * 16; }

  // Starts the copy of a tile. `codes` is the lane's first piece.
  __device__ __forceinline__ static void load(const char* codes, int step, uint32_t tile) {
    const uint32_t first = tile + Tile::place(row(), byte()), second = tile + (Tile::place(row(), byte()) ^ kTurned);
#pragma unroll
    for (int i = 0; i < kTileKeys; i += kTall) {
      const uint32_t to = (i / kTall % 2 == 0 ? first : second) + i * Tile::kPitch;
      cuda::cp_async_16(to, codes + static_cast<int64_t>(step) * i, true);
    }
  }

  // The same, row r from slot slot_of(r), where `codes` is the lane's first piece of the first 16 slots.
  template <class SlotOf>
  __device__ __forceinline__ static void load(const char* codes, int step, uint32_t tile, const SlotOf& slot_of) {
#pragma unroll
    for (int i = 0; i < kTileKeys; i += kTall) {
      const char* source = codes + static_cast<int64_t>(step) * (slot_of(row() + i) - row());
      cuda::cp_async_16(tile + Tile::place(row() + i, byte()), source, true);
    }
  }

  // The same for the first `rows` rows, row r from slot slot_of(r). The others become zeros, but for [encoded,
  // encoded_end), which stay as they are. `nowhere` is an address that exists, also where there is no cache.
  template <class SlotOf>
  __device__ __forceinline__ static void load(const char* codes, int step, uint32_t tile, int rows,
                                              const SlotOf& slot_of, int encoded, int encoded_end,
                                              const void* nowhere) {
#pragma unroll 1
    for (int i = 0; i < kTileKeys; i += kTall) {
      const int at = row() + i;
      if (at >= encoded && at < encoded_end) continue;
      const void* source = at < rows ? codes + static_cast<int64_t>(step) * (slot_of(at) - row()) : nowhere;
      cuda::cp_async_16_reused(tile + Tile::place(at, byte()), source, at < rows);
    }
  }

 private:
  // What swizzles every second of a lane's pieces differently.
  static constexpr int kTurned = Tile::place(kTall % kTileKeys, 0) - kTall % kTileKeys * Tile::kPitch;
};

// Where a lane reads the codes of a segment: its first pieces of the first 16 slots of keys and of values, and its
// scale of the keys (lanes 0 .. 15) or of the values.
struct CodeReader {
  const char *k, *v;
  const float* scale;
  int k_step, v_step, scale_step;  // from slot to slot, in bytes and in floats; fit: check_strides()

  template <class S>
  __device__ __forceinline__ void attach(const KeyParams& p, const Keys& keys) {
    using KPieces = TilePieces<typename S::KTile>;
    using VPieces = TilePieces<typename S::VTile>;
    const CodeSource scales = code_source(p, keys, threadIdx.x % 32 >= kTileKeys);
    k_step = static_cast<int>(p.k_cache_stride.token), v_step = static_cast<int>(p.v_cache_stride.token);
    scale_step = static_cast<int>(scales.scale_step);
    k = keys.k + static_cast<int64_t>(k_step) * KPieces::row() + KPieces::byte();
    v = keys.v + static_cast<int64_t>(v_step) * VPieces::row() + VPieces::byte();
    scale = scales.scale + threadIdx.x % kTileKeys * scales.scale_step;
  }
};

// Starts the copy of a tile of the list: codes of keys, codes of values, then the scales of both. Keys that are neither
// cached nor new become zeros of scale zero: what was never written may be anything.
template <class S>
__device__ __forceinline__ void load_code_tile(const KeyParams& p, const Keys& keys, const CodeReader& reader, int item,
                                               uint32_t stage, char* stage_pointer) {
  using KPieces = TilePieces<typename S::KTile>;
  using VPieces = TilePieces<typename S::VTile>;
  const int tile = item * kTileKeys, row = threadIdx.x % kTileKeys;
  const uint32_t v_stage = stage + S::KTile::kBytes;
  const uint32_t scale_stage = stage + S::scale_at(threadIdx.x % 32 >= kTileKeys, row);
  if (tile + kTileKeys <= keys.used && is_one_run<S>(p, keys, tile)) {
    const int64_t slot = key_slot<S>(p, keys, tile);
    KPieces::load(reader.k + slot * reader.k_step, reader.k_step, stage);
    VPieces::load(reader.v + slot * reader.v_step, reader.v_step, v_stage);
    cuda::cp_async_4(scale_stage, reader.scale + slot * reader.scale_step, true);
    return;
  }
  const auto slot_of = [&](int at) { return key_slot<S>(p, keys, tile + at); };
  if (S::kRing && tile + kTileKeys <= keys.used) {  // over the border of sinks and window, or where the window wraps
    KPieces::load(reader.k, reader.k_step, stage, slot_of);
    VPieces::load(reader.v, reader.v_step, v_stage, slot_of);
    cuda::cp_async_4(scale_stage, reader.scale + static_cast<int64_t>(slot_of(row) - row) * reader.scale_step, true);
    return;
  }
  cuda::grid_dependency_wait();                 // the new tokens may come from the kernel in front
  const int cached = max(0, keys.used - tile);  // rows of the tile that the cache holds
  const int begin = max(0, keys.stored - tile), end = min(kTileKeys, keys.stored + keys.listed - tile);
  KPieces::load(reader.k, reader.k_step, stage, cached, slot_of, begin, end, p.q);
  VPieces::load(reader.v, reader.v_step, v_stage, cached, slot_of, begin, end, p.q);
  if (row < begin || row >= end) {
    const float* scale = reader.scale + static_cast<int64_t>(slot_of(row) - row) * reader.scale_step;
    cuda::cp_async_4(scale_stage, row < cached ? static_cast<const void*>(scale) : p.q, row < cached);
  }
  __syncwarp();
#pragma unroll 1
  for (int i = 2 * begin; i < 2 * end; ++i) {
    const int row = i / 2, piece = 2 * listed_token(keys, tile + row) + i % 2;
    NewVector<S> vector;
    vector.load(p, keys, piece);
    with_tile<S>(i % 2 != 0, [&](auto tile_type, bool is_v) {
      using Tile = decltype(tile_type);
      vector.template encode<typename Tile::Format>(p, keys, piece)
          .template stage<Tile>(stage_pointer + (is_v ? S::KTile::kBytes : 0),
                                reinterpret_cast<float*>(stage_pointer + S::scale_at(is_v, row)), row);
    });
  }
}

}  // namespace zigzag::attend
