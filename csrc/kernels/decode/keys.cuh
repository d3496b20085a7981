// What a decode kernel reads and writes of one (batch, KV head): which keys a row attends, loading them, appending the
// new ones.
//
// The keys form one virtual list, cache slots first:
//
//   in place    the slots as they will be after the append: one new token, ring or Shape::kSingle
//   full cache  the slots in use ++ new tokens; of codes the slots in use after the append ++ tokens that find no slot
//   ring        all slots ++ new tokens
//
// Of a ring with slack, whose slots outside the window may have no memory, the list is by position:
// the sinks in use ++ the window, oldest key first, which in slots is one run, or two where it wraps ++ new tokens.
// Only where a call is sure that all slots have memory it stays with the slots, and hides those outside the window.
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
#include "kernels/decode/geometry.h"
#include "kernels/decode/rotary.cuh"
#include "kv/ring.h"

namespace zigzag::attend {

inline constexpr unsigned kAllRows = (1u << kTileKeys) - 1;  // of a tile, as bits

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
  static constexpr BlockShape kBlock = {kHeadDim, kRowTiles, {}};
  static constexpr int kRows = kBlock.rows();           // rows of a block: N of the mma, times kRowTiles
  static constexpr int kSteps = kHeadDim / 16;          // mma steps along head_dim
  static constexpr int kChunks = kHeadDim / 8;          // 16-byte pieces of a row
  static constexpr int kQuads = kHeadDim / 4;           // float4 pieces of an output row
  static constexpr int kRowBytes = kBlock.row_bytes();  // pitch in shared memory: see swizzled()
  static constexpr int kTileBytes = kTileKeys * kRowBytes;
  static constexpr int kStageBytes = kBlock.stage_bytes();  // K and V
  static constexpr int kStages = kBlock.stages();
  static_assert(kHeadDim % 16 == 0 && kStageBytes == 2 * kTileBytes);

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

// What the launch has decided about lists of keys.
struct KeyParams : AttentionParams {
  bool by_position;   // of a ring, not kSingle: the list is by position
  bool length_first;  // of a full cache, kSingle: no load before the length is known, as slots past it may have no
                      // memory
};

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
  int replaced;      // key whose place in the list the new token takes, -1: none
  int unmasked;      // leading keys of the list that every row attends
  // Of a ring listed by position: the position of the first key of the window, key `sink` of the list, and how far its
  // slot is from its place in the list.
  int window_begin, shift;
  // Of a ring listed by slots, in place: the slots outside the window, `hidden` of them from first_hidden on, in turns.
  int first_hidden, hidden;
};

__device__ __forceinline__ RingLayout ring_layout(const KeyParams& p) { return {p.sink, p.window, p.slots}; }

// Whether the one new token takes its slot's place in the list. Geometry only.
template <class S>
__device__ __forceinline__ bool in_place(const KeyParams& p) {
  return S::kSingle || (S::kRing && !S::kCodes && p.q_len == 1 && p.slots > 0);
}

// Everything but what needs the length and the padding: those are only asked for, so that loads can start behind them.
template <class S>
__device__ __forceinline__ Keys locate_keys(const KeyParams& p, int batch, int kv_head) {
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
__device__ __forceinline__ bool is_by_position(const KeyParams& p) {
  return S::kRing && !S::kSingle && p.by_position;
}

// Lists a ring by position: the sinks in use, then positions [begin, end).
__device__ __forceinline__ void list_window(const KeyParams& p, Keys& keys, int begin, int end) {
  if (keys.stored == 0) return;  // a row that is skipped
  keys.window_begin = begin;
  keys.stored = keys.used = min(end, p.sink + max(0, end - begin));
  keys.shift = end > p.sink ? ring_layout(p).slot(begin) - p.sink : 0;
}

// The keys of one new token, which are all that its list has.
template <class S>
__device__ __forceinline__ void list_ring_in_place(const KeyParams& p, Keys& keys) {
  const int length = keys.slots_length, kept = p.sink + p.window;
  if (is_by_position<S>(p)) {
    list_window(p, keys, max(p.sink, length - p.window), length);
    if (keys.fresh == 1) keys.replaced = keys.used - 1;
    keys.unmasked = keys.used;
    return;
  }
  if (keys.fresh == 1) keys.replaced = ring_layout(p).slot(keys.length);
  keys.used = keys.unmasked = min(length, p.slots);
  if (p.slots == kept || length <= kept) return;
  keys.used = p.slots, keys.unmasked = p.sink;
  keys.hidden = p.slots - kept;
  keys.first_hidden = keys.replaced + 1 < p.slots ? keys.replaced + 1 : p.sink;
}

// Whether a ring listed by slots, in place, hides the key that a slot holds.
__device__ __forceinline__ bool is_hidden(const KeyParams& p, const Keys& keys, int slot) {
  const int turn = slot - keys.first_hidden;
  return slot >= p.sink && (turn < 0 ? turn + p.slots - p.sink : turn) < keys.hidden;
}

// The rows of a tile, as bits, that hold no key: slots that are unused or hidden, and past the end of a list in place.
// One new token attends all others, so that for a list in place this is the mask, too.
template <class S>
__device__ __forceinline__ unsigned vacant_rows(const KeyParams& p, const Keys& keys, int item) {
  const int key = item * kTileKeys + threadIdx.x % kTileKeys;
  const bool vacant =
      key >= keys.used ? in_place<S>(p) || key < keys.stored : S::kRing && keys.hidden > 0 && is_hidden(p, keys, key);
  return __ballot_sync(0xffffffffu, vacant) & kAllRows;
}

template <class S>
__device__ __forceinline__ void settle_keys(const KeyParams& p, Keys& keys) {
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
    if (S::kRing) {
      list_ring_in_place<S>(p, keys);
    } else {
      // Of a full cache without a free slot the new token is one key more.
      if (keys.fresh == 1) keys.replaced = min(keys.length, p.slots);
      keys.used = keys.unmasked = min(keys.length, p.slots) + keys.fresh;
    }
  } else if (S::kRing) {
    keys.unmasked = 0;
    if (is_by_position<S>(p)) {  // the first query sees one key of the past less than the window has
      list_window(p, keys, max(p.sink, keys.length - p.window + 1), keys.length);
    } else {
      keys.used = min(keys.slots_length, p.slots);
    }
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

// Warp steps over the list. At least one, so that an empty list still writes its outputs. Of a ring listed by slots
// independent of the length.
template <class S>
__device__ __forceinline__ int count_items(const KeyParams& p, const Keys& keys) {
  if (S::kSingle) return max(1, ((S::kRing ? p.slots : keys.used) + kTileKeys - 1) / kTileKeys);
  const int listed = !S::kRing ? keys.listed : in_place<S>(p) ? 0 : p.q_len;
  return max(1, (keys.stored + listed + kTileKeys - 1) / kTileKeys);
}

// Position of a key of the list, -1 where there is none.
template <class S>
__device__ __forceinline__ int key_position(const KeyParams& p, const Keys& keys, int key) {
  if (key >= keys.stored) return key < keys.stored + keys.listed ? keys.length + listed_token(keys, key) : -1;
  if (!S::kRing) return key;
  if (is_by_position<S>(p)) return key < p.sink ? key : keys.window_begin + key - p.sink;
  return ring_layout(p).position(key, keys.slots_length);
}

// Slot of a key of the list that is in the cache.
template <class S>
__device__ __forceinline__ int key_slot(const KeyParams& p, const Keys& keys, int key) {
  if (!is_by_position<S>(p) || key < p.sink) return key;
  const int slot = key + keys.shift;
  return slot < p.slots ? slot : slot - (p.slots - p.sink);
}

// Whether the keys of a tile that is all slots lie in slots that follow one another.
template <class S>
__device__ __forceinline__ bool is_one_run(const KeyParams& p, const Keys& keys, int tile) {
  if (!is_by_position<S>(p)) return true;
  return key_slot<S>(p, keys, tile + kTileKeys - 1) - key_slot<S>(p, keys, tile) == kTileKeys - 1;
}

// How the lanes of a warp share a tile: kWide lanes along a row, so that they read whole 32 to 512 byte pieces, the
// others along the rows.
template <class S>
struct TileLanes {
  static constexpr int kPower = S::kChunks & -S::kChunks;  // largest power of two that divides kChunks
  static constexpr int kWide = kPower < 32 ? kPower : 32;
  static constexpr int kTall = 32 / kWide;
  static_assert(kTileKeys % kTall == 0);
};

// First column of the chunk of this head, of V or of K.
__device__ __forceinline__ const char* new_tokens(const KeyParams& p, const Keys& keys, bool is_v) {
  const int64_t batch_stride = is_v ? p.v_new_stride.batch : p.k_new_stride.batch;
  const int64_t head_stride = is_v ? p.v_new_stride.head : p.k_new_stride.head;
  return static_cast<const char*>(is_v ? p.v_new : p.k_new) + 2 * (keys.batch * batch_stride + keys.head * head_stride);
}

// Starts the copy of tile `item` of the list into a stage of the calling warp's ring. Keys that are neither cached nor
// new become zeros: a slot that was never written may hold NaN.
template <class S>
__device__ __forceinline__ void load_tile(const KeyParams& p, const Keys& keys, int item, uint32_t stage) {
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

  if (tile + kTileKeys <= keys.stored && is_one_run<S>(p, keys, tile)) {
    const auto copy = [](uint32_t to, const char* from) { cuda::cp_async_16(to, from, true); };
    const int64_t slot = key_slot<S>(p, keys, tile) + row;
    const char* k = keys.k + slot * k_step + column * 16;
    const char* v = keys.v + slot * v_step + column * 16;
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
      const int64_t slot = key_slot<S>(p, keys, key);
      k = keys.k + slot * k_step + column * 16;
      v = keys.v + slot * v_step + column * 16;
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

}  // namespace zigzag::attend
