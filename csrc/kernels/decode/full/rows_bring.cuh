// What rows_pipeline.cuh multiplies, and how it comes to shared memory: tiles of keys and values by producers, query
// rows by the warpgroups that own them.
#pragma once

#include "cuda/bulk_copy.cuh"
#include "cuda/tensor_map.h"
#include "kernels/decode/full/rows.cuh"
#include "kernels/prefill/pipeline_block.cuh"

namespace zigzag::decode_full {

template <class T, int kHeadDim, int kRowGroups>
struct RowsPipelineBlock : RowsBlock<T, kHeadDim, kRowGroups> {
  using Base = RowsBlock<T, kHeadDim, kRowGroups>;
  using Scores = typename Base::Scores;
  using Output = typename Base::Output;
  using Weights = uint32_t[Base::kKeys / 16][4];  // A fragments
  static constexpr int kProducers = 128;
  static constexpr int kBlockThreads = Base::kThreads + kProducers;
  static constexpr int kGroupProducers = kProducers / Base::kKeyGroups;  // that bring the tiles of one worker
  static constexpr int kStages =                                         // of a worker
      (kMaxSharedBytes - 3 * 1024 - Base::kQueryBytes) / Base::kTileBytes / Base::kKeyGroups;
  static constexpr int kSharedBytes = Base::kQueryBytes + Base::kKeyGroups * kStages * Base::kTileBytes;
  // Registers of a thread: 128 * (56 + 2 * 224) are what the block has at its start, 168 a thread.
  static constexpr int kProducerRegisters = 56, kRowRegisters = 224;
  static_assert(kStages >= 3 && Base::kNorms + Base::kKeyGroups * Base::kRows * 8 <= kSharedBytes);

  // Barriers by number, beside that of RowsBlock::meet.
  static constexpr int kProducersBarrier = 4;  // and 5: those of worker 0, 1

  // Starts scores = q . k for the warpgroup's rows.
  static __device__ __forceinline__ void start_scores(Scores& scores, uint32_t q_tile, uint32_t k_tile) {
    uint32_t q_group = q_tile + threadIdx.x / 128 % kRowGroups * 64 * Base::kRowBytes;
    asm volatile("" : "+r"(q_group));  // or its descriptors would be kept from tile to tile, in 16 registers
    cuda::hold_accumulators(scores[0]);
    cuda::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
      const int block = step / 4, bytes = step % 4 * 32;
      cuda::wgmma_m64n64k16<T>(scores[0],
                               cuda::swizzled_operand(q_group + block * Base::kRows * Base::kRowBytes + bytes),
                               cuda::swizzled_operand(k_tile + block * Base::kKeyChunkBytes + bytes), step > 0);
    }
    cuda::wgmma_commit();
    cuda::hold_accumulators(scores[0]);
  }

  // Starts out += weights . v.
  static __device__ __forceinline__ void start_values(Output& out, Weights& weights, uint32_t v_tile) {
    cuda::hold_accumulators(out[0]);
    cuda::hold_fragments(weights);
    cuda::wgmma_fence();
#pragma unroll
    for (int step = 0; step < Base::kKeys / 16; ++step) {
      const uint64_t values = cuda::swizzled_operand(v_tile + step * 16 * Base::kRowBytes, Base::kKeyChunkBytes);
      if constexpr (kHeadDim == 128) {
        cuda::wgmma_m64n128k16<T>(out[0], weights[step], values);
      } else {
        cuda::wgmma_m64n64k16<T>(out[0], weights[step], values);
      }
    }
    cuda::wgmma_commit();
    cuda::hold_accumulators(out[0]);
  }

  static __device__ __forceinline__ void pack(Weights& weights, const Scores& scores) {
#pragma unroll
    for (int step = 0; step < Base::kKeys / 16; ++step) prefill::pack_weights<T>(weights[step], scores[0], step);
  }
};

struct RowsParams : Params {
  int early_slots;       // that may be read whatever the length
  CUtensorMap boxes[2];  // of the cache: keys, values
};

// The tiles of a worker.
struct TileWalk {
  int first, step, end;
  bool early, wasted;  // the first was asked for before the length was known; it does not lie in the cache as a whole

  // Geometry only.
  template <class Block>
  static __device__ __forceinline__ TileWalk begin(const RowsParams& p, int key_group) {
    const int first = blockIdx.x * Block::kKeyGroups + key_group;
    return {first, static_cast<int>(gridDim.x) * Block::kKeyGroups, 0, (first + 1) * Block::kKeys <= p.early_slots,
            false};
  }

  template <class Block>
  __device__ __forceinline__ void settle(const prefill::QueryTile& tile) {
    end = (tile.keys.count + Block::kKeys - 1) / Block::kKeys;
    wasted = early && (first >= end || (first + 1) * Block::kKeys > tile.length);
  }
};

// Query rows on their way through RoPE to their tile, a few of each thread at a time, which are asked for before
// anything else: behind the tiles, which saturate the memory, they would take longer than those.
template <class Block>
struct RowsOnTheWay {
  using T = typename Block::Element;
  static constexpr int kItems = Block::kRows * Block::kChunks / Block::kThreads;
  static constexpr int kBatch = kItems < 8 ? kItems : 8;
  static constexpr int kRowStep = Block::kThreads / Block::kChunks;
  static_assert(Block::kThreads % Block::kChunks == 0 && kItems % kBatch == 0);

  uint4 data[kBatch];
  Turn<T> turn[kBatch];

  __device__ __forceinline__ static int row_of(int item) { return threadIdx.x / Block::kChunks + item * kRowStep; }

  __device__ __forceinline__ void load(const Params& p, int head, int first_row, int first_item) {
    const int turning = turning_pairs(p), pair = threadIdx.x % Block::kChunks, batch = blockIdx.z;
    const QuadPair quads = quads_of(pair, turning);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int packed = first_row + row_of(first_item + i), column = packed / p.group;
      data[i] = make_uint4(0, 0, 0, 0);
      if (column >= p.q_len) continue;
      const int64_t source = batch * p.q_stride.batch + (head * p.group + packed - column * p.group) * p.q_stride.head +
                             column * p.q_stride.token;
      data[i] = load_pair(static_cast<const char*>(p.q) + 2 * source, quads);
      if (pair < turning) turn[i].load(p, batch, column, quads);
    }
  }

  // Rows of padding, and past the last, become zeros. A negative scale turns the signs of queries, which turns those of
  // all scores.
  __device__ __forceinline__ void store(const Params& p, const prefill::QueryTile& tile, int first_item,
                                        unsigned char* q_tile) const {
    const int turning = turning_pairs(p), pair = threadIdx.x % Block::kChunks;
    const QuadPair quads = quads_of(pair, turning);
    const uint32_t signs = p.scale < 0.0f ? 0x80008000u : 0u;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int row = row_of(first_item + i), column = tile.column(row);
      uint4 x = make_uint4(0, 0, 0, 0);
      if (column >= tile.pad && column < p.q_len) {
        x = pair < turning ? turn[i].apply(p, data[i]) : data[i];
        x = make_uint4(x.x ^ signs, x.y ^ signs, x.z ^ signs, x.w ^ signs);
      }
      *tile_quad(q_tile, Block::query_offset, row, quads.low) = make_uint2(x.x, x.y);
      *tile_quad(q_tile, Block::query_offset, row, quads.high) = make_uint2(x.z, x.w);
    }
  }
};

// The new tokens of a KV head on their way to their slots, shared among the threads that own rows: asked for as query
// rows are, before the length is known. (A load of the tables behind the tiles would hold up a block from which others
// want its part.)
template <class Block>
struct TokensOnTheWay {
  using T = typename Block::Element;
  static constexpr int kPerToken = 2 * Block::kChunks;  // pieces: pairs of quads of the key, then of the value
  static constexpr int kItems = kMaxDecodeQueries * kPerToken / Block::kThreads;
  static_assert(kItems > 0);

  uint4 data[kItems];
  Turn<T> turn[kItems];

  __device__ __forceinline__ static int column_of(int item) {
    return (threadIdx.x + item * Block::kThreads) / kPerToken;
  }
  // The same for all items of a thread.
  __device__ __forceinline__ static bool is_value() { return threadIdx.x / Block::kChunks % 2 != 0; }
  __device__ __forceinline__ static int pair_of() { return threadIdx.x % Block::kChunks; }

  __device__ __forceinline__ void load(const Params& p, int head) {
    const int turning = is_value() ? 0 : turning_pairs(p), batch = blockIdx.z;
    const Strides& stride = is_value() ? p.v_new_stride : p.k_new_stride;
    const char* from =
        static_cast<const char*>(is_value() ? p.v_new : p.k_new) + 2 * (batch * stride.batch + head * stride.head);
    const QuadPair quads = quads_of(pair_of(), turning);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int column = column_of(i);
      if (column >= p.q_len) continue;
      data[i] = load_pair(from + 2 * column * stride.token, quads);
      if (pair_of() < turning) turn[i].load(p, batch, column, quads);
    }
  }

  // But for padding and what finds no slot.
  __device__ __forceinline__ void append(const Params& p, const prefill::QueryTile& tile) const {
    const int turning = is_value() ? 0 : turning_pairs(p);
    const prefill::KeySource& cache = tile.source[1];
    char* to = const_cast<char*>(is_value() ? cache.v : cache.k);
    const int64_t token_bytes = is_value() ? cache.v_bytes : cache.k_bytes;
    const QuadPair quads = quads_of(pair_of(), turning);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int column = column_of(i), slot = tile.length + column - tile.pad;
      if (column >= p.q_len || column < tile.pad || slot >= p.slots) continue;
      store_pair(to + slot * token_bytes, quads, pair_of() < turning ? turn[i].apply(p, data[i]) : data[i]);
    }
  }
};

// Turns the new keys of a tile in place, by the threads that bring it.
template <class Block>
__device__ __forceinline__ void rotate_keys_of_tile(const Params& p, const prefill::QueryTile& tile, int number,
                                                    unsigned char* k_tile, int thread) {
  const int turning = turning_pairs(p);
  const int first = max(number, tile.length - tile.keys.first), until = min(number + Block::kKeys, tile.keys.count);
#pragma unroll 1
  for (int i = thread; i < (until - first) * Block::kChunks; i += Block::kGroupProducers) {
    const int key = first + i / Block::kChunks, pair = i % Block::kChunks;
    if (pair >= turning) continue;
    const QuadPair quads = quads_of(pair, turning);
    Turn<typename Block::Element> turn;
    turn.load(p, tile.batch, tile.pad + tile.keys.position(key) - tile.length, quads);
    uint2* low = tile_quad(k_tile, Block::key_offset, key - number, quads.low);
    uint2* high = tile_quad(k_tile, Block::key_offset, key - number, quads.high);
    const uint4 x = turn.apply(p, make_uint4(low->x, low->y, high->x, high->y));
    *low = make_uint2(x.x, x.y), *high = make_uint2(x.z, x.w);
  }
}

// Starts the copy of the 64 keys from a slot on, or of their values, by one thread.
template <class Block>
__device__ __forceinline__ void copy_slots(const CUtensorMap& map, uint32_t destination, int slot, int cache_head,
                                           int cache_row, uint64_t& full) {
  const uint32_t barrier = cuda::shared_address(&full);
  cuda::barrier_expect(barrier, Block::kKeyBytes);
#pragma unroll
  for (int block = 0; block < Block::kHeadDim / 64; ++block) {
    cuda::copy_box(destination + block * Block::kKeyChunkBytes, &map, block * 64, slot, cache_head, cache_row, barrier);
  }
}

// The producers of a worker, which keep pace, so that none of them is a phase ahead.
template <class Block, class Barriers>
__device__ __forceinline__ void bring_tiles(const RowsParams& p, const prefill::QueryTile& tile, const TileWalk& walk,
                                            Barriers& barriers, unsigned char* stages, int key_group) {
  const int thread = threadIdx.x % Block::kGroupProducers;
  const RingLayout layout{p.sink, p.window, p.slots};
  prefill::StageCursor<Block::kStages> cursor;
  if (walk.early) cursor.advance();
  int at = walk.early && !walk.wasted ? walk.first + walk.step : walk.first;
#pragma unroll 1
  for (; at < walk.end; at += walk.step, cursor.advance()) {
    const int number = at * Block::kKeys, slot = tile.keys.first + number;
    unsigned char* stage = stages + cursor.stage * Block::kTileBytes;
    const uint32_t k_tile = cuda::shared_address(stage);
    // Of the first round the stages are empty already: see barrier_wait.
    cuda::barrier_wait(cuda::shared_address(&barriers.k_empty[cursor.stage]), cursor.parity ^ 1);
    if (slot + Block::kKeys <= tile.length) {
      uint64_t &k_full = barriers.k_full[cursor.stage], &v_full = barriers.v_full[cursor.stage];
      if (thread == 0) copy_slots<Block>(p.boxes[0], k_tile, slot, tile.cache_head, tile.cache_row, k_full);
      cuda::barrier_wait(cuda::shared_address(&barriers.v_empty[cursor.stage]), cursor.parity ^ 1);
      if (thread == 0) {
        copy_slots<Block>(p.boxes[1], k_tile + Block::kKeyBytes, slot, tile.cache_head, tile.cache_row, v_full);
      }
    } else {
      const auto meet = [&] { cuda::named_barrier_sync(Block::kProducersBarrier + key_group, Block::kGroupProducers); };
      cuda::barrier_wait(cuda::shared_address(&barriers.v_empty[cursor.stage]), cursor.parity ^ 1);
      prefill::load_keys<Block, Block::kGroupProducers>(layout, tile, number, k_tile, thread);
      cuda::cp_async_commit();
      cuda::cp_async_wait<0>();
      if (turning_pairs(p) > 0) {
        meet();
        rotate_keys_of_tile<Block>(p, tile, number, stage, thread);
      }
      Block::publish();
      meet();
      if (thread == 0) {
        cuda::barrier_arrive(cuda::shared_address(&barriers.k_full[cursor.stage]));
        cuda::barrier_arrive(cuda::shared_address(&barriers.v_full[cursor.stage]));
      }
    }
  }
}

}  // namespace zigzag::decode_full
