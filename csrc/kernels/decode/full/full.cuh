// Split-KV decode over a full cache in one launch. plan.h tells how row groups are spread over blocks and how their
// parts are merged: the grid depends on the geometry and the GPU, the cut on the lengths, which only the device knows.
#pragma once

#include "core/dispatch.h"
#include "kernels/attention.h"
#include "kernels/decode/full/workspace.h"
#include "kernels/decode/launch_plan.cuh"
#include "kernels/decode/segments.cuh"

namespace zigzag::decode_full {

using namespace attend;

static_assert(kTileKeys == kReadTile, "readable_slots() says so");

// How tiles are cut into runs of nearly the same size: those of all row groups, or those of a team's.
struct Split {
  unsigned total;   // tiles
  unsigned blocks;  // runs; blocks past it idle

  // First tile of a run: floor(block * total / blocks), without 64-bit products of lengths.
  __device__ __forceinline__ unsigned begin(unsigned block) const {
    return block * (total / blocks) + block * (total % blocks) / blocks;
  }
  // The run that holds a tile.
  __device__ __forceinline__ int owner(unsigned tile) const {
    return static_cast<int>(((static_cast<uint64_t>(tile) + 1) * blocks - 1) / total);
  }
};

// Uses fewer blocks where a run would not give every warp a tile; whole multiples of the row groups keep the cut
// aligned.
__device__ __forceinline__ Split make_split(unsigned total, unsigned groups, unsigned warps) {
  unsigned blocks = gridDim.x;
  if (blocks >= groups) {
    const unsigned mean = (total / groups + warps - 1) / warps;
    blocks = groups * max(1u, min(blocks / groups, mean));
  }
  return {total, min(blocks, total)};
}

// Partial result in the workspace, of block `block` of those that share a row group, whose last one is `last`: a run's
// last row group goes on in the next run.
template <class S>
__device__ __forceinline__ char* partial(const Params& p, int block, int last) {
  const int64_t index = 2 * block + (block == last ? 0 : 1);
  return static_cast<char*>(p.workspace) + kCounterBytes + index * partial_bytes(S::kRows, S::kHeadDim);
}

// Merges through the workspace, as block `block` of [from, last], which share the segment's row group.
template <class S>
__device__ __forceinline__ void finish_in_memory(const Params& p, const Segment& segment, State<S>& state, int block,
                                                 int from, int last) {
  gather_in_block<S>(p, segment, state);
  const int rows = rows_of<S>(p, segment);
  float4* out = reinterpret_cast<float4*>(partial<S>(p, block, last));
  float2* norm = reinterpret_cast<float2*>(out + S::kRows * S::kQuads);
  for (int i = threadIdx.x; i < rows * S::kQuads; i += blockDim.x) {
    const Partial part = merge_warps<S>(p.layout, i / S::kQuads, i % S::kQuads);
    __stcg(out + i, part.out);
    if (i % S::kQuads == 0) __stcg(norm + i / S::kQuads, part.norm);
  }
  __shared__ bool is_last;
  __syncthreads();
  if (threadIdx.x == 0) {  // its release covers what the barrier has shown it of the other threads' writes
    unsigned* counters = static_cast<unsigned*>(p.workspace);
    const unsigned others = last - from;
    is_last = cuda::atomic_inc_acq_rel(counters + from, others) == others;
  }
  __syncthreads();
  if (!is_last) return;
  for (int i = threadIdx.x; i < rows * S::kQuads; i += blockDim.x) {
    const int row = i / S::kQuads;
    const auto part = [&](int k) { return reinterpret_cast<const float4*>(partial<S>(p, from + k, last)); };
    write_result<S>(
        p, segment, row, i % S::kQuads,
        merge_partials<S::kCodes, 16>(
            last - from + 1, [&](int k) { return __ldcg(part(k) + i); },
            [&](int k) { return __ldcg(reinterpret_cast<const float2*>(part(k) + S::kRows * S::kQuads) + row); }));
  }
}

// Merges what the first `blocks` blocks of a team have; the others have nothing.
template <class S>
__device__ __forceinline__ void finish_team(const Params& p, const Segment& segment, State<S>& state, int blocks) {
  const int rank = blockIdx.x, from = blockIdx.y * p.team;
  if (rank >= blocks) return;
  if (blocks == 1) return finish_in_block<S>(p, segment, state);
  finish_in_memory<S>(p, segment, state, from + rank, from, from + blocks - 1);
}

template <class S>
struct Job {
  const Params& p;
  Split split;
  unsigned at, stop;  // of runs: tiles, numbered through all row groups; the run is done up to `at` and ends at `stop`

  __device__ __forceinline__ Keys find_keys(int batch, int kv_head) const {
    Keys keys = locate_keys<S>(p, batch, kv_head);
    settle_keys<S>(p, keys);
    return keys;
  }

  // Finds the first segment of this block; false where there is nothing to do.
  __device__ __forceinline__ bool start(Segment& segment) {
    const unsigned warps = blockDim.x / 32;
    if (p.team > 0) {
      const int kv_head = p.row_blocks == 1 ? blockIdx.y : blockIdx.y / p.row_blocks;
      segment.row_block = blockIdx.y - kv_head * p.row_blocks;
      segment.keys = find_keys(blockIdx.z, kv_head);
      const unsigned items = count_items<S>(p, segment.keys), team = p.team;
      // Fewer blocks where they would not all have a tile for every warp; in a cluster all take part in the merge.
      split = {items, in_cluster<S>(p) ? team : min(team, (items + warps - 1) / warps)};
      segment.begin = static_cast<int>(split.begin(blockIdx.x));
      segment.end = static_cast<int>(split.begin(blockIdx.x + 1));
      return blockIdx.x < split.blocks;
    }
    const int lane = threadIdx.x % 32;
    const unsigned groups_per_row = p.num_kv_heads * p.row_blocks;
    const auto tiles = [&](int b) { return b < p.batch ? count_items<S>(p, find_keys(b, 0)) * groups_per_row : 0u; };
    unsigned total = 0;
    for (int b = lane; b < p.batch; b += 32) total += tiles(b);
    total = __reduce_add_sync(0xffffffffu, total);
    split = make_split(total, p.batch * groups_per_row, warps);
    if (blockIdx.x >= split.blocks) return false;
    at = split.begin(blockIdx.x);
    stop = split.begin(blockIdx.x + 1);

    unsigned before = 0;  // tiles of the batch rows before `base`
    for (int base = 0;; base += 32) {
      unsigned until = tiles(base + lane);  // inclusive prefix sum over the lanes
#pragma unroll
      for (int offset = 1; offset < 32; offset *= 2) {
        const unsigned other = __shfl_up_sync(0xffffffffu, until, offset);
        if (lane >= offset) until += other;
      }
      const unsigned holds = __ballot_sync(0xffffffffu, before + until > at);
      if (holds != 0) {
        const int hit = __ffs(holds) - 1;
        if (hit > 0) before += __shfl_sync(0xffffffffu, until, hit - 1);
        const unsigned items = tiles(base + hit) / groups_per_row;
        const unsigned group = (at - before) / items;
        enter(segment, base + hit, group / p.row_blocks, group % p.row_blocks, (at - before) % items);
        return true;
      }
      before += __shfl_sync(0xffffffffu, until, 31);
    }
  }

  __device__ __forceinline__ void enter(Segment& segment, int batch, int kv_head, int row_block, unsigned begin) {
    segment.keys = find_keys(batch, kv_head);
    segment.row_block = row_block;
    segment.begin = static_cast<int>(begin);
    segment.end = static_cast<int>(min(static_cast<unsigned>(count_items<S>(p, segment.keys)), begin + (stop - at)));
  }

  __device__ __forceinline__ bool next(Segment& segment) {
    if (p.team > 0) return false;
    at += segment.end - segment.begin;
    if (at >= stop) return false;
    int batch = segment.keys.batch, kv_head = segment.keys.kv_head, row_block = segment.row_block + 1;
    if (row_block == p.row_blocks) row_block = 0, ++kv_head;
    if (kv_head == p.num_kv_heads) kv_head = 0, ++batch;
    enter(segment, batch, kv_head, row_block, 0);
    return true;
  }

  __device__ __forceinline__ void finish(const Segment& segment, State<S>& state, bool more) const {
    if (in_cluster<S>(p)) return finish_in_cluster<S>(p, segment, state, more);
    if (p.team > 0) return finish_team<S>(p, segment, state, split.blocks);
    const unsigned items = count_items<S>(p, segment.keys);
    if (segment.begin == 0 && segment.end == static_cast<int>(items)) return finish_in_block<S>(p, segment, state);
    const unsigned group_begin = at - segment.end;  // next() has moved `at` past this segment
    finish_in_memory<S>(p, segment, state, blockIdx.x, split.owner(group_begin), split.owner(group_begin + items - 1));
  }
};

template <class S>
__device__ __forceinline__ void run_one_token(const Params& p) {
  run_single<S>(p, [&](const Segment& segment, State<S>& state) {
    if (in_cluster<S>(p)) return finish_in_cluster<S>(p, segment, state, false);
    finish_team<S>(p, segment, state, min(p.team, count_items<S>(p, segment.keys)));
  });
}

template <class S>
__global__ void __launch_bounds__(kMaxWarps * 32, 1) decode_full_kernel(const __grid_constant__ Params p) {
  if constexpr (S::kSingle) {
    run_one_token<S>(p);
  } else {
    if (in_cluster<S>(p)) cuda::cluster_arrive_relaxed();
    Segment segment;
    Job<S> job = {p, {}, 0, 0};
    if (job.start(segment)) run_segments<S>(p, segment, job);
  }
}

// For one new token: see bare_params.
template <class S>
__global__ void __launch_bounds__(kMaxWarps * 32, 1) decode_full_bare_kernel(const __grid_constant__ Params p) {
  run_one_token<S>(bare_params<S>(p));
}

template <class Element, int kHeadDim, int kRowTiles>
void launch_shape(const AttentionParams& a, void* stream) {
  using S = Shape<Element, kHeadDim, kRowTiles, false, false>;
  using Single = Shape<Element, kHeadDim, kRowTiles, false, true>;
  launch_planned<S>(a, decode_full_kernel<S>, decode_full_kernel<Single>, stream, decode_full_bare_kernel<Single>);
}

// Several new tokens on the warpgroup products of sm_90a (rows_pipeline.cuh); false, and nothing launched, where that
// kernel does not serve the call. Compiled where ZIGZAG_SM90A is 1.
template <class Element>
bool launch_decode_rows(const AttentionParams& a, void* stream);

template <class Element>
void launch_decode_full(const AttentionParams& a, void* stream) {
  ZZ_CHECK(a.workspace_bytes >= workspace_bytes(a.head_dim), "workspace of ", a.workspace_bytes,
           " bytes is too small; needed: ", workspace_bytes(a.head_dim));
  check_strides(a);
#if ZIGZAG_SM90A
  const bool plain = a.softcap == 0.0f && a.sink_logits == nullptr;  // what that computes
  if (plain && launch_decode_rows<Element>(a, stream)) return;
#endif
  dispatch_head_dim(a.head_dim, [&](auto head_dim) {
    dispatch_bool(a.num_q_heads / a.num_kv_heads * a.q_len > 8, [&](auto many_rows) {
      launch_shape<Element, head_dim.value, row_tiles(head_dim.value, many_rows.value ? 16 : 8)>(a, stream);
    });
  });
}

}  // namespace zigzag::decode_full
