// What a decode kernel reads and writes of one (batch, KV head): which keys a row attends, loading them, appending the
// new ones.
//
// The keys form one virtual list, cache slots first:
//
//   in place    the slots as they will be after the append: one new token, ring or Shape::kSingle
//   full cache  the slots in use ++ new tokens; of codes the slots in use after the append ++ tokens that find no slot
//   ring        all slots ++ new tokens
//
// A listed token is read from k_new / v_new and never from the cache, so appending it needs no ordering against the
// reads of its own slot. A token that a full cache of codes takes is not encoded twice: the block that attends its slot
// appends it first, then reads it like any other. (Several row blocks of a head all do so, with the same bytes.)
//
// Loads of a list in place need no length: they start before it is known, and what it then shows to be unused or
// replaced is repaired in shared memory (repair_tile).
#pragma once

#include "core/params.h"
#include "cuda/ptx.cuh"
#include "kernels/decode/rotary.cuh"
#include "kv/ring.h"

namespace zigzag::attend {

inline constexpr int kTileKeys = 16;  // keys of one warp step: M of mma.m16n8k16

template <class S>
struct NewPair;

// Compile-time geometry. Rows are (query column, head of the group) pairs, packed column-major: row = column * group +
// head.
//
// kSingle: one new token per row, a list in place, one segment per block, merged by a team. This is the decode step of
// a small batch, where latency is what counts: nothing that only other cases need is on its path.
template <class Element_, int kHeadDim_, int kRowTiles_, bool kRing_, bool kSingle_>
struct Shape {
  using Element = Element_;
  static constexpr bool kRing = kRing_;
  static constexpr bool kSingle = kSingle_;
  static constexpr bool kCodes = false;  // quantised caches: see CodeShape in codes/tile.cuh
  using NewPiece = NewPair<Shape>;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kRowTiles = kRowTiles_;
  static constexpr int kRows = 8 * kRowTiles;   // rows of a block: N of the mma, times kRowTiles
  static constexpr int kSteps = kHeadDim / 16;  // mma steps along head_dim
  static constexpr int kChunks = kHeadDim / 8;  // 16-byte pieces of a row
  static constexpr int kQuads = kHeadDim / 4;   // float4 pieces of an output row
  // Pitch of a row in shared memory, a power of two: see swizzled().
  static constexpr int kRowBytes = kHeadDim > 128 ? 512 : kHeadDim > 64 ? 256 : 128;
  static constexpr int kTileBytes = kTileKeys * kRowBytes;
  static constexpr int kStageBytes = 2 * kTileBytes;  // K and V
  // Ring depth per warp: one stage in use, the rest in flight. 64 to 100 KB in flight per SM saturate the memory of an
  // H100.
  static constexpr int kStages = kHeadDim > 64 ? 2 : 4;
  static_assert(kHeadDim % 16 == 0);

  // The dim that a lane of group g holds in State::out[step], in its elements 0, 1 (half 0) or 2, 3 (half 1).
  __device__ __forceinline__ static constexpr int out_dim(int step, int g, int half) {
    return step * 16 + half * 8 + g;
  }
};

// Rows of shared memory keep their 16-byte pieces swizzled: piece c of row r lies at place c ^ (r % 8). The 8 rows of
// an ldmatrix then fall on different banks, and every 128 bytes that cp.async writes stay one aligned line. (Rows
// padded by 16 bytes are free of bank conflicts too, but split those writes in two: a third more L2 reads, 7% less
// bandwidth on an H100.)
__device__ __forceinline__ uint32_t swizzled(int row, int chunk, int row_bytes) {
  return row * row_bytes + ((chunk ^ (row % 8)) << 4);
}

// From the address of piece c to that of piece c + `chunks` of the same row, where c and `chunks` share no bit.
__device__ __forceinline__ uint32_t advance_chunks(uint32_t address, int chunks) {
  return (address ^ ((chunks % 8) << 4)) + ((chunks / 8) << 7);
}

struct Keys {
  int batch;
  int cache_row;  // of the caches and their scales; 0 where the row is skipped, whose list is empty
  int kv_head;    // of the caches
  int head;       // of q (its group), k_new, v_new, out and lse
  const char* k;  // slot 0 of this head
  const char* v;
  int stored;        // cache slots in the list
  int listed;        // new tokens in the list, after the slots: the last ones of the chunk
  int length;        // tokens before this call
  int first;         // leading padding columns of this launch's part of the chunk, once settled
  int fresh;         // new tokens
  int slots_length;  // the length at which the slots of the list are to be understood
  int used;          // slots in use: of a list in place, and of codes, after the append
  int replaced;      // slot whose place in the list the new token takes, -1: none
  int unmasked;      // leading keys of the list that every row attends
};

__device__ __forceinline__ RingLayout ring_layout(const AttentionParams& p) { return {p.sink, p.window}; }

// Whether the one new token takes its slot's place in the list. Geometry only.
template <class S>
__device__ __forceinline__ bool in_place(const AttentionParams& p) {
  return S::kSingle || (S::kRing && !S::kCodes && p.q_len == 1 && p.slots > 0);
}

// Everything but what needs the length and the padding: those are only asked for, so that loads can start behind them.
template <class S>
__device__ __forceinline__ Keys locate_keys(const AttentionParams& p, int batch, int kv_head) {
  Keys keys = {};
  const ChunkRow row = chunk_row(p, batch);
  keys.length = row.length;
  keys.first = row.pad;
  keys.batch = batch;
  keys.kv_head = kv_head;
  keys.head = p.heads(kv_head);
  keys.cache_row = max(row.cache_row, 0);
  keys.stored = row.cache_row < 0 ? 0 : p.slots;
  constexpr int kUnit = S::kCodes ? 1 : 2;  // bytes per unit of a cache's stride
  const auto head_of = [&](const void* cache, const Strides& stride) {
    return static_cast<const char*>(cache) + kUnit * (keys.cache_row * stride.batch + kv_head * stride.head);
  };
  keys.k = head_of(p.k_cache, p.k_cache_stride);
  keys.v = head_of(p.v_cache, p.v_cache_stride);
  return keys;
}

template <class S>
__device__ __forceinline__ void settle_keys(const AttentionParams& p, Keys& keys) {
  if constexpr (S::kCodes) {  // to this launch's part of the columns
    keys.first -= p.columns_before;
    keys.length += max(0, -keys.first);
    keys.first = clamp_padding(keys.first, p.q_len);
  }
  keys.fresh = p.q_len - keys.first;
  keys.slots_length = keys.length;
  keys.replaced = -1;
  keys.listed = keys.fresh;
  if (in_place<S>(p)) {
    keys.listed = 0;
    keys.slots_length += keys.fresh;
    // Of a full cache without a free slot the new token is one key more.
    if (keys.fresh == 1) keys.replaced = S::kRing ? ring_layout(p).slot(keys.length) : min(keys.length, p.slots);
    keys.used = keys.unmasked = S::kRing ? min(keys.slots_length, p.slots) : min(keys.length, p.slots) + keys.fresh;
  } else if (S::kRing) {
    keys.used = min(keys.slots_length, p.slots);
    keys.unmasked = 0;
  } else {
    keys.unmasked = min(keys.length, p.slots);
    keys.stored = keys.used = S::kCodes ? min(keys.length + keys.fresh, p.slots) : keys.unmasked;
    keys.listed = min(keys.length + keys.fresh - keys.stored, keys.fresh);
  }
}

// The new token, counted from the first one that is no padding, behind key `key` of the list, which is not a slot.
__device__ __forceinline__ int listed_token(const Keys& keys, int key) {
  return keys.fresh - keys.listed + key - keys.stored;
}

// Warp steps over the list. At least one, so that an empty list still writes its outputs. Of a ring independent of the
// length.
template <class S>
__device__ __forceinline__ int count_items(const AttentionParams& p, const Keys& keys) {
  if (S::kSingle) return max(1, ((S::kRing ? p.slots : keys.used) + kTileKeys - 1) / kTileKeys);
  const int listed = !S::kRing ? keys.listed : in_place<S>(p) ? 0 : p.q_len;
  return max(1, (keys.stored + listed + kTileKeys - 1) / kTileKeys);
}

// Position of a key of the list, -1 where there is none.
template <class S>
__device__ __forceinline__ int key_position(const AttentionParams& p, const Keys& keys, int key) {
  if (key < keys.stored) return S::kRing ? ring_layout(p).position(key, keys.slots_length) : key;
  return key < keys.stored + keys.listed ? keys.length + listed_token(keys, key) : -1;
}

// How the lanes of a warp share a tile: kWide lanes along a row, so that they read whole 32 to 512 byte pieces, the
// others along the rows.
template <class S>
struct TileLanes {
  static constexpr int kWide = S::kChunks & -S::kChunks;  // largest power of two that divides kChunks
  static constexpr int kTall = 32 / kWide;
  static_assert(kWide <= 32 && kTileKeys % kTall == 0);
};

// First column of the chunk of this head, of V or of K.
__device__ __forceinline__ const char* new_tokens(const AttentionParams& p, const Keys& keys, bool is_v) {
  const int64_t batch_stride = is_v ? p.v_new_stride.batch : p.k_new_stride.batch;
  const int64_t head_stride = is_v ? p.v_new_stride.head : p.k_new_stride.head;
  return static_cast<const char*>(is_v ? p.v_new : p.k_new) + 2 * (keys.batch * batch_stride + keys.head * head_stride);
}

// Starts the copy of tile `item` of the list into a stage of the calling warp's ring. Keys that are neither cached nor
// new become zeros: a slot that was never written may hold NaN.
template <class S>
__device__ __forceinline__ void load_tile(const AttentionParams& p, const Keys& keys, int item, uint32_t stage) {
  using Lanes = TileLanes<S>;
  const int lane = threadIdx.x % 32;
  const int row = lane / Lanes::kWide, column = lane % Lanes::kWide;
  const int tile = item * kTileKeys;
  const uint32_t k_stage = stage + swizzled(row, column, S::kRowBytes);
  const uint32_t v_stage = k_stage + S::kTileBytes;
  const int k_step = static_cast<int>(2 * p.k_cache_stride.token);  // fits: check_strides()
  const int v_step = static_cast<int>(2 * p.v_cache_stride.token);

  // Row `row + i` of the tile; i is a multiple of kTall > row, so that it moves the swizzle bit by bit.
  const auto copy_row = [&](uint32_t destination, int i, const char* source, const auto& copy) {
#pragma unroll
    for (int j = 0; j < S::kChunks; j += Lanes::kWide) {
      copy(advance_chunks(destination ^ ((i % 8) << 4), j) + i * S::kRowBytes, source + j * 16);
    }
  };

  if (tile + kTileKeys <= keys.stored) {
    const auto copy = [](uint32_t to, const char* from) { cuda::cp_async_16(to, from, true); };
    const char* k = keys.k + static_cast<int64_t>(tile + row) * k_step + column * 16;
    const char* v = keys.v + static_cast<int64_t>(tile + row) * v_step + column * 16;
#pragma unroll
    for (int i = 0; i < kTileKeys; i += Lanes::kTall) copy_row(k_stage, i, k + static_cast<int64_t>(i) * k_step, copy);
#pragma unroll
    for (int i = 0; i < kTileKeys; i += Lanes::kTall) copy_row(v_stage, i, v + static_cast<int64_t>(i) * v_step, copy);
    return;
  }

  if (!S::kSingle) cuda::grid_dependency_wait();  // the new tokens may come from the kernel in front
  // An address that exists, also where nothing is read.
  const char* k_new = S::kSingle ? static_cast<const char*>(p.q) : new_tokens(p, keys, false) + column * 16;
  const char* v_new = S::kSingle ? k_new : new_tokens(p, keys, true) + column * 16;
#pragma unroll 1
  for (int i = 0; i < kTileKeys; i += Lanes::kTall) {
    const int key = tile + row + i;
    const bool cached = key < keys.stored, valid = cached || (!S::kSingle && key < keys.stored + keys.listed);
    const char *k = k_new, *v = v_new;
    if (cached) {
      k = keys.k + static_cast<int64_t>(key) * k_step + column * 16;
      v = keys.v + static_cast<int64_t>(key) * v_step + column * 16;
    } else if (valid) {
      const int64_t token = keys.first + listed_token(keys, key);
      k += 2 * token * p.k_new_stride.token;
      v += 2 * token * p.v_new_stride.token;
    }
    // Without the cache policy: in this loop ptxas 13.0 puts its descriptor in a register pair that does not exist
    // ("desc[UR1]"), and the GPU stops at an illegal instruction.
    const auto copy = [&](uint32_t to, const char* from) { cuda::cp_async_16_reused(to, from, valid); };
    copy_row(k_stage, i, k, copy);
    copy_row(v_stage, i, v, copy);
  }
}

// Address of a quad in a swizzled row of shared memory.
template <class S>
__device__ __forceinline__ uint2* quad_at(char* rows, int row, int quad) {
  return reinterpret_cast<uint2*>(rows + swizzled(row, quad / 2, S::kRowBytes) + quad % 2 * 8);
}

// The one new token of a list in place, K row then V row, spread over the lanes of a warp by pairs of quads: lane
// `pair` holds K's pair of that number.
template <class S>
struct NewToken {
  static constexpr int kPieces = (2 * S::kChunks + 31) / 32;
  uint4 piece[kPieces];

  __device__ __forceinline__ static QuadPair quads(const AttentionParams& p, int chunk) {
    return chunk < S::kChunks ? quads_of(chunk, turning_pairs(p)) : quads_of(chunk - S::kChunks, 0);
  }

  __device__ __forceinline__ void load(const AttentionParams& p, const Keys& keys) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int chunk = threadIdx.x % 32 + 32 * i;
      if (chunk >= 2 * S::kChunks) continue;
      piece[i] = load_pair(new_tokens(p, keys, chunk >= S::kChunks), quads(p, chunk));
    }
  }

  // `turn` is that of pair `lane` at the token's position.
  __device__ __forceinline__ void rotate(const AttentionParams& p, const Turn<typename S::Element>& turn) {
    if (threadIdx.x % 32 < turning_pairs(p)) piece[0] = turn.apply(p, piece[0]);
  }

  __device__ __forceinline__ void store(const AttentionParams& p, char* stage, int row) const {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int chunk = threadIdx.x % 32 + 32 * i;
      if (chunk >= 2 * S::kChunks) continue;
      char* rows = stage + (chunk < S::kChunks ? 0 : S::kTileBytes);
      const QuadPair to = quads(p, chunk);
      *quad_at<S>(rows, row, to.low) = make_uint2(piece[i].x, piece[i].y);
      *quad_at<S>(rows, row, to.high) = make_uint2(piece[i].z, piece[i].w);
    }
  }

  // Appends the token to the cache.
  __device__ __forceinline__ void append(const AttentionParams& p, const Keys& keys, int slot) const {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int chunk = threadIdx.x % 32 + 32 * i;
      if (chunk >= 2 * S::kChunks) continue;
      const bool is_v = chunk >= S::kChunks;
      const int64_t offset = slot * (is_v ? p.v_cache_stride.token : p.k_cache_stride.token);
      store_pair(const_cast<char*>(is_v ? keys.v : keys.k) + 2 * offset, quads(p, chunk), piece[i]);
    }
  }
};

// Brings a loaded tile of a list in place up to date: the new token in its slot's place, zeros for the values of unused
// slots. (Those may hold NaN, which a weight of zero would not silence; their keys do not matter, the mask overwrites
// the logits.) The warp that replaces the slot in its tile also appends the token: nobody else reads the slot. Past the
// capacity there is no slot, only a key.
template <class S>
__device__ __forceinline__ void repair_tile(const AttentionParams& p, const Keys& keys, int item, char* stage,
                                            const NewToken<S>& token) {
  const int tile = item * kTileKeys;
  if (tile + kTileKeys > keys.used && tile < keys.stored) {
    const int from = max(keys.used - tile, 0), until = min(keys.stored - tile, kTileKeys);
#pragma unroll 1
    for (int i = from * S::kChunks + threadIdx.x % 32; i < until * S::kChunks; i += 32) {
      char* target = stage + S::kTileBytes + swizzled(i / S::kChunks, i % S::kChunks, S::kRowBytes);
      *reinterpret_cast<uint4*>(target) = make_uint4(0, 0, 0, 0);
    }
  }
  if (keys.replaced >= tile && keys.replaced < tile + kTileKeys) {
    token.store(p, stage, keys.replaced - tile);
    if (keys.replaced < p.slots) token.append(p, keys, keys.replaced);
  }
}

// Rotates the new keys of a loaded tile, of a list that has them after the slots.
template <class S>
__device__ __forceinline__ void rotate_tile(const AttentionParams& p, const Keys& keys, int item, char* stage) {
  const int tile = item * kTileKeys, turning = turning_pairs(p);
  const int from = max(keys.stored - tile, 0), until = min(keys.stored + keys.listed - tile, kTileKeys);
#pragma unroll 1
  for (int i = from * S::kChunks + threadIdx.x % 32; i < until * S::kChunks; i += 32) {
    const int row = i / S::kChunks, pair = i % S::kChunks;
    if (pair >= turning) continue;
    const QuadPair quads = quads_of(pair, turning);
    Turn<typename S::Element> turn;
    turn.load(p, keys.batch, keys.first + listed_token(keys, tile + row), quads);
    uint2 *low = quad_at<S>(stage, row, quads.low), *high = quad_at<S>(stage, row, quads.high);
    const uint4 turned = turn.apply(p, make_uint4(low->x, low->y, high->x, high->y));
    *low = make_uint2(turned.x, turned.y), *high = make_uint2(turned.z, turned.w);
  }
}

// One pair of quads of a new key or value on its way to its slot, of one lane. Pieces are numbered through new tokens:
// kPerToken of each, keys first.
template <class S>
struct NewPair {
  static constexpr int kPerToken = 2 * S::kChunks;
  uint4 data;

  __device__ __forceinline__ void load(const AttentionParams& p, const Keys& keys, int i) {
    const bool is_v = i / S::kChunks % 2 != 0;
    const int column = keys.first + i / kPerToken;
    const char* token = new_tokens(p, keys, is_v) + 2 * column * (is_v ? p.v_new_stride.token : p.k_new_stride.token);
    data = load_pair(token, quads_of(i % S::kChunks, is_v ? 0 : turning_pairs(p)));
  }

  __device__ __forceinline__ void append(const AttentionParams& p, const Keys& keys, int i, int slot) const {
    const bool is_v = i / S::kChunks % 2 != 0;
    const int pair = i % S::kChunks, turning = is_v ? 0 : turning_pairs(p);
    const QuadPair quads = quads_of(pair, turning);
    uint4 turned = data;
    if (pair < turning) {
      Turn<typename S::Element> turn;
      turn.load(p, keys.batch, keys.first + i / kPerToken, quads);
      turned = turn.apply(p, data);
    }
    const int64_t target = slot * (is_v ? p.v_cache_stride.token : p.k_cache_stride.token);
    store_pair(const_cast<char*>(is_v ? keys.v : keys.k) + 2 * target, quads, turned);
  }
};

// New tokens on their way to their slots, their pieces shared among the lanes or warps of one or several blocks. The
// first pieces can be asked for long before they are appended.
template <class S>
struct NewTokens {
  using Piece = typename S::NewPiece;
  Piece piece;
  int next, end;  // pieces: the one that is under way, the first one not to append

  // Tokens [from, until), of which the caller takes pieces `first`, `first` + step, ... of append().
  __device__ __forceinline__ void load(const AttentionParams& p, const Keys& keys, int from, int until, int first) {
    next = from * Piece::kPerToken + first, end = until * Piece::kPerToken;
    if (next < end) piece.load(p, keys, next);
  }

  // Skips what a ring would overwrite within this chunk and what lies past the capacity.
  __device__ __forceinline__ void append(const AttentionParams& p, const Keys& keys, int step) {
    const RingLayout layout = ring_layout(p);
#pragma unroll 1
    while (next < end) {
      const int position = keys.length + next / Piece::kPerToken, slot = layout.slot(position);
      if (slot < p.slots && layout.survives(position, keys.length + keys.fresh)) piece.append(p, keys, next, slot);
      next += step;
      if (next < end) piece.load(p, keys, next);
    }
  }
};

}  // namespace zigzag::attend
