// Split-KV decode over a full cache in one launch. Two ways to spread a (batch, KV head, row block) -- a row group --
// over blocks:
//
//   cluster   4 to 16 blocks per row group, merged through distributed shared memory: fastest where they fill nearly
//             half of the GPU and need no second wave. Quantised caches, and several row groups per KV head, ask for 4
//             or 8 that fill nearly all of it. For one row only: each row of a batch would get the same number of
//             blocks, however different their lengths
//   split     the tiles of all row groups, laid end to end, are cut into equal runs, one per block: equal lengths give
//             splits that align with the row groups, ragged batches stay balanced. A row group that several blocks
//             share is merged by the block that comes last, in block order
//
// The grid depends on the geometry and the GPU, the cut on the lengths, which only the device knows.
#pragma once

#include <algorithm>

#include "core/dispatch.h"
#include "device/launch.h"
#include "kernels/attend.cuh"
#include "kernels/attention.h"
#include "kernels/decode_full/workspace.h"

namespace zigzag::decode_full {

using namespace attend;

static_assert(kTileKeys == kReadTile && kMaxCluster * kMaxWarps * kTileKeys <= kReadAhead, "readable_slots() says so");

// How the tiles of all row groups are cut into runs.
struct Split {
  unsigned total;   // tiles of all row groups
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
__device__ __forceinline__ Split make_split(unsigned total, unsigned groups) {
  unsigned blocks = gridDim.x;
  const unsigned warps = blockDim.x / 32;
  if (blocks >= groups) {
    const unsigned mean = (total / groups + warps - 1) / warps;
    blocks = groups * max(1u, min(blocks / groups, mean));
  }
  return {total, min(blocks, total)};
}

template <class S>
struct Job {
  const Params& p;
  Split split;
  unsigned at, stop;  // tiles, numbered through all row groups: the run is done up to `at` and ends at `stop`

  __device__ __forceinline__ Keys find_keys(int batch, int kv_head) const {
    Keys keys = locate_keys<S>(p, batch, kv_head);
    settle_keys<S>(p, keys);
    return keys;
  }

  // Finds the first segment of this block; false where there is nothing to do.
  __device__ __forceinline__ bool start(Segment& segment) {
    if (in_cluster<S>(p)) {
      const int rank = device::cluster_rank();
      const int kv_head = p.row_blocks == 1 ? blockIdx.y : blockIdx.y / p.row_blocks;
      segment.row_block = blockIdx.y - kv_head * p.row_blocks;
      segment.keys = find_keys(blockIdx.z, kv_head);
      const unsigned items = count_items<S>(p, segment.keys);
      segment.begin = static_cast<int>((items * rank) >> p.cluster_log2);
      segment.end = static_cast<int>((items * (rank + 1)) >> p.cluster_log2);
      return true;
    }
    const int lane = threadIdx.x % 32;
    const unsigned groups_per_row = p.num_kv_heads * p.row_blocks;
    const auto tiles = [&](int b) { return b < p.batch ? count_items<S>(p, find_keys(b, 0)) * groups_per_row : 0u; };
    unsigned total = 0;
    for (int b = lane; b < p.batch; b += 32) total += tiles(b);
    total = __reduce_add_sync(0xffffffffu, total);
    split = make_split(total, p.batch * groups_per_row);
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
    if (in_cluster<S>(p)) return false;
    at += segment.end - segment.begin;
    if (at >= stop) return false;
    int batch = segment.keys.batch, kv_head = segment.keys.kv_head, row_block = segment.row_block + 1;
    if (row_block == p.row_blocks) row_block = 0, ++kv_head;
    if (kv_head == p.num_kv_heads) kv_head = 0, ++batch;
    enter(segment, batch, kv_head, row_block, 0);
    return true;
  }

  // No block reads a slot at or past the length, so the block with the last tile may append at any time. Here the wait
  // for the new tokens hides behind the key loads.
  __device__ __forceinline__ void loaded(const Segment& segment) const {
    if (segment.row_block != 0 || segment.end != count_items<S>(p, segment.keys) || segment.begin == segment.end)
      return;
    append_new_tokens<S>(p, segment.keys, threadIdx.x, blockDim.x);
  }

  __device__ __forceinline__ void finish(const Segment& segment, State<S>& state, bool more) const {
    if (in_cluster<S>(p)) return finish_in_cluster<S>(p, segment, state, more);
    const unsigned items = count_items<S>(p, segment.keys);
    if (segment.begin == 0 && segment.end == static_cast<int>(items)) return finish_in_block<S>(p, segment, state);
    const unsigned group_begin = at - segment.end;  // next() has moved `at` past this segment
    finish_split(segment, state, split.owner(group_begin), split.owner(group_begin + items - 1));
  }

  // Partial result of run `block` of a row group that ends in run `last`: a run's last row group goes on in the next
  // run.
  __device__ __forceinline__ char* partial(int block, int last) const {
    const int64_t index = 2 * block + (block == last ? 0 : 1);
    return static_cast<char*>(p.workspace) + kCounterBytes + index * partial_bytes(S::kRows, S::kHeadDim);
  }

  // The row group is shared by the runs [from, last].
  __device__ __forceinline__ void finish_split(const Segment& segment, State<S>& state, int from, int last) const {
    gather_in_block<S>(p, segment, state);
    const int rows = rows_of<S>(p, segment);
    float4* out = reinterpret_cast<float4*>(partial(blockIdx.x, last));
    float2* norm = reinterpret_cast<float2*>(out + S::kRows * S::kQuads);
    for (int i = threadIdx.x; i < rows * S::kQuads; i += blockDim.x) {
      const Partial part = merge_warps<S>(p.layout, i / S::kQuads, i % S::kQuads);
      __stcg(out + i, part.out);
      if (i % S::kQuads == 0) __stcg(norm + i / S::kQuads, part.norm);
    }
    __shared__ bool is_last;
    __syncthreads();
    if (threadIdx.x == 0) {
      unsigned* counters = static_cast<unsigned*>(p.workspace);
      const unsigned others = last - from;
      __threadfence();
      is_last = device::atomic_inc_acq_rel(counters + from, others) == others;
    }
    __syncthreads();
    if (!is_last) return;
    for (int i = threadIdx.x; i < rows * S::kQuads; i += blockDim.x) {
      const int row = i / S::kQuads;
      const auto part = [&](int k) { return reinterpret_cast<const float4*>(partial(from + k, last)); };
      write_result<S>(
          p, segment, row, i % S::kQuads,
          merge_partials<S::kCodes>(
              last - from + 1, [&](int k) { return __ldcg(part(k) + i); },
              [&](int k) { return __ldcg(reinterpret_cast<const float2*>(part(k) + S::kRows * S::kQuads) + row); }));
    }
  }
};

template <class S>
__global__ void __launch_bounds__(kMaxWarps * 32, 1) decode_full_kernel(const __grid_constant__ Params p) {
  if constexpr (S::kSingle) {
    run_single<S>(p);
  } else {
    if (in_cluster<S>(p)) device::cluster_arrive_relaxed();
    Segment segment;
    Job<S> job = {p, {}, 0, 0};
    if (job.start(segment)) run_segments<S>(p, segment, job);
  }
}

// Blocks of the split kernel: one per SM, or a few fewer if every head of every row then has whole blocks or every
// block whole heads, as far as rows are equally long. A block that ends within a head has partial results to merge.
inline int choose_blocks(const Params& p, int sm_count) {
  const int groups = p.batch * p.num_kv_heads;
  if (p.row_blocks > 1) return sm_count;  // they read the same keys: aligned ones, at the same time, were slower
  for (int blocks = sm_count; blocks >= sm_count * 19 / 20; --blocks) {
    if (blocks % groups == 0 || groups % blocks == 0) return blocks;
  }
  return sm_count;
}

// Fills `p` and `config` for a cluster size.
template <class S>
void configure(Params& p, device::LaunchConfig& config, int cluster) {
  const device::DeviceInfo& device = device::device_info();
  const device::LaunchOptions& options = device::launch_options();
  // Twice the blocks of a head merge twice the partials, each of half as many warps: measured faster, on an H100.
  const int most = cluster > 8 ? kMaxWarps / 2 : kMaxWarps;
  int warps = options.warps > 0 ? std::min(options.warps, kMaxWarps) : most;
  const auto layout = [&] { return shared_layout<S>(warps, S::kStages, cluster); };
  while (warps > 1 && layout().total > device.shared_bytes) --warps;
  p.layout = layout();
  p.cluster_log2 = device::floor_log2(cluster);
  config.cluster = cluster;
  config.block = dim3(static_cast<unsigned>(32 * warps));
  config.shared_bytes = p.layout.total;
  const int blocks = options.blocks > 0 ? options.blocks : choose_blocks(p, device.sm_count);
  config.grid = dim3(static_cast<unsigned>(std::min(blocks, kMaxBlocks)));
  if (cluster > 1) {
    config.grid = dim3(static_cast<unsigned>(cluster), static_cast<unsigned>(p.num_kv_heads * p.row_blocks),
                       static_cast<unsigned>(p.batch));
  }
}

// Launches `split`, or `in_cluster` where a cluster per row group fills the GPU.
template <class Split>
void launch_kernels(const AttentionParams& a, void (*split)(Params), void (*in_cluster)(Params), void* stream) {
  const device::DeviceInfo& device = device::device_info();
  const device::LaunchOptions& options = device::launch_options();
  const int group = a.num_q_heads / a.num_kv_heads, rows = group * a.q_len;
  Params p = {a, {}, group, (rows + Split::kRows - 1) / Split::kRows, 0};
  const int groups = a.batch * p.num_kv_heads * p.row_blocks;
  const bool modern = device.arch >= 90 && !options.force_plain;

  // Blocks on at least nearly half of the SMs saturate the memory (in clusters of 2 they do not); a second wave of
  // clusters would not. 16 comes last, for few row groups: few places of a GPU take such a cluster, and its blocks of
  // half the warps share SMs. Two kinds of work want nearly all SMs to themselves: codes become operands first, and
  // several row blocks read the same keys.
  const bool computes = (Split::kCodes || p.row_blocks > 1) && options.cluster == 0;
  const int least = computes ? device.sm_count * 9 / 10 : device.sm_count * 4 / 9;
  device::LaunchConfig config = {};
  // A launch that reads what the one before it appended must not start early.
  const bool whole = a.columns_before + a.columns_after == 0;
  config.dependent_launch = modern && options.dependent_launch && whole;
  for (const int cluster : {8, 4, 2, 16}) {
    if (!modern || (options.cluster > 0 ? options.cluster != cluster : a.batch > 1 || cluster == 2)) continue;
    if (groups * cluster < least || groups * cluster > device.sm_count || (computes && cluster > 8)) continue;
    configure<Split>(p, config, cluster);
    if (groups <= device::max_active_clusters(in_cluster, config)) return device::launch(in_cluster, config, p, stream);
  }
  configure<Split>(p, config, 1);
  device::launch(split, config, p, stream);
}

template <class Element, int kHeadDim, int kRowTiles>
void launch_shape(const AttentionParams& a, void* stream) {
  using Split = Shape<Element, kHeadDim, kRowTiles, false, false>;
  using Single = Shape<Element, kHeadDim, kRowTiles, false, true>;
  launch_kernels<Split>(a, decode_full_kernel<Split>,
                        a.q_len == 1 ? decode_full_kernel<Single> : decode_full_kernel<Split>, stream);
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
