// Decode over a sink + window ring in one launch, append included. The blocks of a cluster share one (batch, KV head)
// and merge through distributed shared memory; without clusters one block takes it all.
//
// A chunk of several tokens overwrites slots that its own first queries still attend. So one cluster reads everything
// of its (batch, KV head), row block after row block, and appends after the barrier of the last merge.
#pragma once

#include <algorithm>

#include "core/dispatch.h"
#include "cuda/launch.h"
#include "kernels/attention.h"
#include "kernels/decode/segments.cuh"

namespace zigzag::decode_stream {

using namespace attend;

inline constexpr int kHiddenSlots = 64;  // four tiles: on top of a ring of 320 slots they cost less than to wait first

// Anything but the one new token that a cluster attends: see SingleJob.
template <class S>
struct Job {
  const Params& p;
  int rank;

  __device__ __forceinline__ Segment start() const {
    Segment segment;
    segment.keys = locate_keys<S>(p, blockIdx.z, blockIdx.y);
    settle_keys<S>(p, segment.keys);
    segment.row_block = 0;
    const int items = count_items<S>(p, segment.keys);
    segment.begin = (items * rank) >> p.cluster_log2;
    segment.end = (items * (rank + 1)) >> p.cluster_log2;
    return segment;
  }

  __device__ __forceinline__ bool next(Segment& segment) const { return ++segment.row_block < p.row_blocks; }

  __device__ __forceinline__ void finish(const Segment& segment, State<S>& state, bool more) const {
    if (in_cluster<S>(p)) {
      finish_in_cluster<S>(p, segment, state, more);
    } else {
      finish_in_block<S>(p, segment, state);
    }
    if (more || in_place<S>(p)) return;
    NewTokens<S> tokens;
    const int threads = S::kCodes ? blockDim.x / 32 : blockDim.x, thread = S::kCodes ? threadIdx.x / 32 : threadIdx.x;
    tokens.load(p, segment.keys, 0, segment.keys.fresh, rank * threads + thread);
    tokens.append(p, segment.keys, p.team * threads);
  }
};

template <class S>
__global__ void __launch_bounds__(kMaxWarps * 32, 1) decode_stream_kernel(const __grid_constant__ Params p) {
  if constexpr (S::kSingle) {
    run_single<S>(p, [&](const Segment& segment, State<S>& state) { finish_in_cluster<S>(p, segment, state, false); });
  } else {
    if (in_cluster<S>(p)) cuda::cluster_arrive_relaxed();
    Job<S> job = {p, in_cluster<S>(p) ? cuda::cluster_rank() : 0};
    run_segments<S>(p, job.start(), job);
  }
}

// Blocks per KV head: a short ring is all latency, so half of the GPU is enough and leaves a second block per SM; a
// long one needs every SM. At least two tiles per block.
inline int choose_cluster_log2(int tiles, int heads, int sm_count) {
  const int target = tiles > 64 ? sm_count / heads : sm_count / (2 * heads);
  int log2 = 0;
  while (log2 < 3 && 2 << log2 <= target && 4 << log2 <= tiles) ++log2;
  return log2;
}

// Whether all slots of a ring with slack have memory, whatever the lengths, and are about as many as the window's: then
// the list of one new token can be that of the slots, whose loads need no length.
inline bool has_all_slots(const AttentionParams& a) {
  return a.slots - a.sink - a.window <= kHiddenSlots && a.cache_rows.of == nullptr &&
         a.slots <= readable_slots(0, a.batch, a.num_kv_heads);
}

// Shares `tiles` out to at most `most` warps of each block, and lays out their shared memory.
template <class S>
void configure(Params& p, cuda::LaunchConfig& config, int tiles, int most) {
  const cuda::LaunchOptions& options = cuda::launch_options();
  const int block_tiles = (tiles + p.cluster() - 1) / p.cluster();
  const int max_warps = options.warps > 0 ? std::min(options.warps, kMaxWarps) : most;
  const int rounds = (block_tiles + max_warps - 1) / max_warps;
  int warps = (block_tiles + rounds - 1) / rounds;
  const auto layout = [&] { return shared_layout<S>(warps, (block_tiles + warps - 1) / warps, p.cluster()); };
  while (warps > 1 && layout().total > cuda::device_info().shared_bytes) --warps;
  p.layout = layout();
  config.block = dim3(static_cast<unsigned>(32 * warps));
  config.shared_bytes = p.layout.total;
}

// Launches `one_token` where a cluster attends one new token over a list in place that is the slots, else `any`.
template <class S>
void launch_kernels(const AttentionParams& a, void (*any)(Params), void (*one_token)(Params), void* stream) {
  const cuda::DeviceInfo& device = cuda::device_info();
  const cuda::LaunchOptions& options = cuda::launch_options();
  const bool modern = cuda::code_arch(reinterpret_cast<const void*>(any)) >= 90 && !options.force_plain;
  const int group = a.num_q_heads / a.num_kv_heads, rows = group * a.q_len;
  const int heads = a.batch * a.num_kv_heads;
  const bool in_place = !S::kCodes && a.q_len == 1 && a.slots > 0;
  const bool by_position = a.slots > 0 && a.slots > a.sink + a.window && !(in_place && has_all_slots(a));
  const int listed = (by_position ? a.sink + a.window : a.slots) + (in_place ? 0 : a.q_len);
  const int tiles = (listed + kTileKeys - 1) / kTileKeys;

  Params p = {{a, by_position, false}, {}, group, (rows + S::kRows - 1) / S::kRows, 1, 0};
  if (modern) p.cluster_log2 = choose_cluster_log2(tiles, heads, device.sm_count);
  if (modern && options.cluster > 0) p.cluster_log2 = cuda::floor_log2(std::min(options.cluster, kMaxRingCluster));
  p.team = p.cluster();
  cuda::LaunchConfig config = {};
  config.grid =
      dim3(static_cast<unsigned>(p.cluster()), static_cast<unsigned>(a.num_kv_heads), static_cast<unsigned>(a.batch));
  config.cluster = p.cluster();
  const bool single = a.q_len == 1 && a.slots > 0 && p.cluster() > 1 && !by_position;
  const auto kernel = single ? one_token : any;
  configure<S>(p, config, tiles, kMaxWarps);
  const bool fits = p.cluster() > 1 ? heads <= cuda::max_active_clusters(kernel, config) : heads <= device.sm_count;
  if (!fits) {
    // Blocks of all warps, one an SM, would not run all at once: where two of half the warps fit, they share an SM, and
    // one loads while the other merges. (An SM has as much as one block may ask for, and 1 KB more.)
    configure<S>(p, config, tiles, kMaxWarps / 2);
    if (2 * (p.layout.total + 1024) > device.shared_bytes) configure<S>(p, config, tiles, kMaxWarps);
  }
  // A launch that reads what the one before it appended must not start early.
  const bool whole = a.columns_before + a.columns_after == 0;
  config.dependent_launch = modern && options.dependent_launch && whole;
  cuda::launch(kernel, config, p, stream);
}

template <class Element, int kHeadDim, int kRowTiles>
void launch_shape(const AttentionParams& a, void* stream) {
  using S = Shape<Element, kHeadDim, kRowTiles, true, false>;
  using Single = Shape<Element, kHeadDim, kRowTiles, true, true>;
  launch_kernels<S>(a, decode_stream_kernel<S>, decode_stream_kernel<Single>, stream);
}

template <class Element>
void launch_decode_stream(const AttentionParams& a, void* stream) {
  check_strides(a);
  dispatch_head_dim(a.head_dim, [&](auto head_dim) {
    dispatch_bool(a.num_q_heads / a.num_kv_heads * a.q_len > 8, [&](auto two_row_tiles) {
      launch_shape<Element, head_dim.value, two_row_tiles.value ? 2 : 1>(a, stream);
    });
  });
}

}  // namespace zigzag::decode_stream
