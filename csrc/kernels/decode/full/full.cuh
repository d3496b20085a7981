// Split-KV decode over a full cache in one launch. Ways to spread a (batch, KV head, row block) -- a row group -- over
// blocks:
//
//   team      as many blocks for each row group, where that leaves few SMs idle. For one row only: each row of a batch
//             would get the same number of blocks, however different their lengths
//   runs      the tiles of all row groups, laid end to end, are cut into equal runs, one per block: equal lengths give
//             runs that align with the row groups, ragged batches stay balanced
//
// and two ways to make one result of a row group's parts:
//
//   cluster   through distributed shared memory: fastest where teams of 4 to 16 blocks fill nearly half of the GPU and
//             need no second wave. Quantised caches, and several row groups per KV head, ask for 4 or 8 that fill
//             nearly all of it
//   memory    through the workspace: the block that comes last merges, in block order
//
// The grid depends on the geometry and the GPU, the cut on the lengths, which only the device knows.
#pragma once

#include <algorithm>

#include "core/dispatch.h"
#include "cuda/launch.h"
#include "kernels/attention.h"
#include "kernels/decode/full/workspace.h"
#include "kernels/decode/segments.cuh"

namespace zigzag::decode_full {

using namespace attend;

static_assert(kTileKeys == kReadTile && kMaxCluster * kMaxWarps * kTileKeys <= kReadAhead, "readable_slots() says so");

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
__global__ void __launch_bounds__(kMaxWarps * 32, 1) decode_full_kernel(const __grid_constant__ Params p) {
  if constexpr (S::kSingle) {
    run_single<S>(p, [&](const Segment& segment, State<S>& state) {
      if (in_cluster<S>(p)) return finish_in_cluster<S>(p, segment, state, false);
      finish_team<S>(p, segment, state, min(p.team, count_items<S>(p, segment.keys)));
    });
  } else {
    if (in_cluster<S>(p)) cuda::cluster_arrive_relaxed();
    Segment segment;
    Job<S> job = {p, {}, 0, 0};
    if (job.start(segment)) run_segments<S>(p, segment, job);
  }
}

// Blocks that share out runs: one per SM, or a few fewer if every head of every row then has whole blocks or every
// block whole heads, as far as rows are equally long. A block that ends within a head has partial results to merge.
inline int choose_blocks(const Params& p, int sm_count) {
  const int groups = p.batch * p.num_kv_heads;
  if (p.row_blocks > 1) return sm_count;  // they read the same keys: aligned runs, at the same time, were slower
  for (int blocks = sm_count; blocks >= sm_count * 19 / 20; --blocks) {
    if (blocks % groups == 0 || groups % blocks == 0) return blocks;
  }
  return sm_count;
}

// Fills `p` and `config` for teams of `team` blocks, which merge as clusters or through memory; team 0: runs.
template <class S>
void configure(Params& p, cuda::LaunchConfig& config, int team, bool cluster) {
  const cuda::DeviceInfo& device = cuda::device_info();
  const cuda::LaunchOptions& options = cuda::launch_options();
  config.cluster = cluster ? team : 1;
  // Twice the blocks of a head merge twice the partials, each of half as many warps: measured faster, on an H100.
  const int most = config.cluster > 8 ? kMaxWarps / 2 : kMaxWarps;
  int warps = options.warps > 0 ? std::min(options.warps, kMaxWarps) : most;
  const auto layout = [&] { return shared_layout<S>(warps, S::kStages, config.cluster); };
  while (warps > 1 && layout().total > device.shared_bytes) --warps;
  p.layout = layout();
  p.team = team;
  p.cluster_log2 = cuda::floor_log2(config.cluster);
  config.block = dim3(static_cast<unsigned>(32 * warps));
  config.shared_bytes = p.layout.total;
  if (team > 0) {
    config.grid = dim3(static_cast<unsigned>(team), static_cast<unsigned>(p.num_kv_heads * p.row_blocks),
                       static_cast<unsigned>(p.batch));
  } else {
    const int blocks = options.blocks > 0 ? options.blocks : choose_blocks(p, device.sm_count);
    config.grid = dim3(static_cast<unsigned>(std::min(blocks, kMaxBlocks)));
  }
}

// Launches `one_token` in clusters and where a team reads no further ahead than those, else `any`. (For several new
// tokens, and for codes, they are the same kernel.)
template <class S>
void launch_kernels(const AttentionParams& a, void (*any)(Params), void (*one_token)(Params), void* stream) {
  const cuda::DeviceInfo& device = cuda::device_info();
  const cuda::LaunchOptions& options = cuda::launch_options();
  const int group = a.num_q_heads / a.num_kv_heads, rows = group * a.q_len;
  const bool length_first = a.cache_rows.of != nullptr;
  Params p = {{a, false, length_first}, {}, group, (rows + S::kRows - 1) / S::kRows, 0, 0};
  const int groups = a.batch * p.num_kv_heads * p.row_blocks;
  const bool modern = cuda::code_arch(reinterpret_cast<const void*>(any)) >= 90 && !options.force_plain;
  cuda::LaunchConfig config = {};
  // A launch that reads what the one before it appended must not start early.
  const bool whole = a.columns_before + a.columns_after == 0;
  config.dependent_launch = modern && options.dependent_launch && whole;

  // Blocks on at least nearly half of the SMs saturate the memory (in clusters of 2 they do not); a second wave of
  // clusters would not. 16 comes last, for few row groups: few places of a GPU take such a cluster, and its blocks of
  // half the warps share SMs. Two kinds of work want nearly all SMs to themselves: codes become operands first, and
  // several row blocks read the same keys.
  const bool computes = (S::kCodes || p.row_blocks > 1) && options.cluster == 0;
  const int nearly_all = device.sm_count * 9 / 10, least = computes ? nearly_all : device.sm_count * 4 / 9;
  for (const int cluster : {8, 4, 2, 16}) {
    if (!modern || (options.cluster > 0 ? options.cluster != cluster : a.batch > 1 || cluster == 2)) continue;
    if (groups * cluster < least || groups * cluster > device.sm_count || (computes && cluster > 8)) continue;
    configure<S>(p, config, cluster, true);
    if (groups <= cuda::max_active_clusters(one_token, config)) return cuda::launch(one_token, config, p, stream);
  }

  const int team = std::min(device.sm_count, kMaxBlocks) / groups;
  const bool fills = a.batch == 1 && options.blocks == 0 && team * groups >= nearly_all;
  configure<S>(p, config, fills ? team : 0, false);
  cuda::launch(fills && team > 1 && team <= kMaxCluster ? one_token : any, config, p, stream);
}

template <class Element, int kHeadDim, int kRowTiles>
void launch_shape(const AttentionParams& a, void* stream) {
  using S = Shape<Element, kHeadDim, kRowTiles, false, false>;
  using Single = Shape<Element, kHeadDim, kRowTiles, false, true>;
  launch_kernels<S>(a, decode_full_kernel<S>, a.q_len == 1 ? decode_full_kernel<Single> : decode_full_kernel<S>,
                    stream);
}

template <class Element>
void launch_decode_full(const AttentionParams& a, void* stream) {
  ZZ_CHECK(a.workspace_bytes >= workspace_bytes(a.head_dim), "workspace of ", a.workspace_bytes,
           " bytes is too small; needed: ", workspace_bytes(a.head_dim));
  check_strides(a);
  dispatch_head_dim(a.head_dim, [&](auto head_dim) {
    dispatch_bool(a.num_q_heads / a.num_kv_heads * a.q_len > 8, [&](auto two_row_tiles) {
      launch_shape<Element, head_dim.value, two_row_tiles.value ? 2 : 1>(a, stream);
    });
  });
}

}  // namespace zigzag::decode_full
