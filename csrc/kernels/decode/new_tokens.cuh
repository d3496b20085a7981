// New tokens in the decode kernels: in the place that a list of keys has for them, turned by RoPE, and on their way to
// their slots.
#pragma once

#include "kernels/decode/keys.cuh"

namespace zigzag::attend {

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

  __device__ __forceinline__ static QuadPair quads(const KeyParams& p, int chunk) {
    return chunk < S::kChunks ? quads_of(chunk, turning_pairs(p)) : quads_of(chunk - S::kChunks, 0);
  }

  __device__ __forceinline__ void load(const KeyParams& p, const Keys& keys) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int chunk = threadIdx.x % 32 + 32 * i;
      if (chunk >= 2 * S::kChunks) continue;
      piece[i] = load_pair(new_tokens(p, keys, chunk >= S::kChunks), quads(p, chunk));
    }
  }

  // `turn` has those of pairs `lane`, `lane` + 32, ... at the token's position.
  template <int kParts>
  __device__ __forceinline__ void rotate(const KeyParams& p, const Turn<typename S::Element> (&turn)[kParts]) {
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      if (threadIdx.x % 32 + 32 * i < turning_pairs(p)) piece[i] = turn[i].apply(p, piece[i]);
    }
  }

  __device__ __forceinline__ void store(const KeyParams& p, char* stage, int row) const {
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
  __device__ __forceinline__ void append(const KeyParams& p, const Keys& keys, int slot) const {
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

// Brings a loaded tile of slots up to date: zeros for the values of its vacant rows, and in a list in place the new
// token in its slot's place. (Vacant rows may hold NaN, which a weight of zero would not silence; their keys do not
// matter, the mask overwrites the logits.) The warp that replaces the slot in its tile also appends the token: nobody
// else reads the slot. Past the capacity there is no slot, only a key.
template <class S>
__device__ __forceinline__ void repair_tile(const KeyParams& p, const Keys& keys, int item, char* stage,
                                            unsigned vacant, const NewToken<S>& token) {
  using Lanes = TileLanes<S>;
  const int tile = item * kTileKeys;
  if (vacant != 0) {  // all rows at once: row by row, in a ring with slack they took longer than to load the tile
    const int row = threadIdx.x % 32 / Lanes::kWide, column = threadIdx.x % 32 % Lanes::kWide;
#pragma unroll
    for (int i = 0; i < kTileKeys; i += Lanes::kTall) {
      if ((vacant >> (row + i) & 1) == 0) continue;
#pragma unroll
      for (int j = 0; j < S::kChunks; j += Lanes::kWide) {
        char* target = stage + S::kTileBytes + swizzled(row + i, column + j, S::kRowBytes);
        *reinterpret_cast<uint4*>(target) = make_uint4(0, 0, 0, 0);
      }
    }
  }
  if (keys.replaced >= tile && keys.replaced < tile + kTileKeys) {
    token.store(p, stage, keys.replaced - tile);
    const int slot = key_slot<S>(p, keys, keys.replaced);
    if (slot < p.slots) token.append(p, keys, slot);
  }
}

// Rotates the new keys of a loaded tile, of a list that has them after the slots.
template <class S>
__device__ __forceinline__ void rotate_tile(const KeyParams& p, const Keys& keys, int item, char* stage) {
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

  __device__ __forceinline__ void load(const KeyParams& p, const Keys& keys, int i) {
    const bool is_v = i / S::kChunks % 2 != 0;
    const int column = keys.first + i / kPerToken;
    const char* token = new_tokens(p, keys, is_v) + 2 * column * (is_v ? p.v_new_stride.token : p.k_new_stride.token);
    data = load_pair(token, quads_of(i % S::kChunks, is_v ? 0 : turning_pairs(p)));
  }

  __device__ __forceinline__ void append(const KeyParams& p, const Keys& keys, int i, int slot) const {
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
  __device__ __forceinline__ void load(const KeyParams& p, const Keys& keys, int from, int until, int first) {
    next = from * Piece::kPerToken + first, end = until * Piece::kPerToken;
    if (next < end) piece.load(p, keys, next);
  }

  // Skips what a ring would overwrite within this chunk and what lies past the capacity.
  __device__ __forceinline__ void append(const KeyParams& p, const Keys& keys, int step) {
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
