// Decode over a sink + window ring in one launch, append included. The blocks of a cluster share one (batch, KV head)
// and merge through distributed shared memory; without clusters one block takes it all.
//
// A chunk of several tokens overwrites slots that its own first queries still attend. So one cluster reads everything
// of its (batch, KV head), row block after row block, and appends after the barrier of the last merge.
#pragma once

#include <algorithm>

#include "core/dispatch.h"
#include "device/launch.h"
#include "kernels/attend.cuh"

namespace zigzag::decode_stream {

using namespace attend;

struct Params {
  AttentionParams attention;
  SharedLayout layout;
  int row_blocks;   // row blocks per KV head, one after the other
  int cluster;      // blocks per KV head
  bool keys_first;  // load keys before waiting for the kernel in front: see run_segments
};

template <class S>
struct Job {
  const Params& p;
  int rank;

  __device__ __forceinline__ Segment start() const {
    const int head = blockIdx.x / p.cluster;
    Segment segment;
    segment.keys = find_keys<true>(p.attention, head / p.attention.num_kv_heads, head % p.attention.num_kv_heads);
    segment.row_block = 0;
    const int64_t items = count_items<true>(p.attention, segment.keys);
    segment.begin = static_cast<int>(items * rank / p.cluster);
    segment.end = static_cast<int>(items * (rank + 1) / p.cluster);
    return segment;
  }

  __device__ __forceinline__ bool next(Segment& segment) const { return ++segment.row_block < p.row_blocks; }

  // A single new token replaces a key that no row attends: whether a block reads the old or the new bytes of that slot,
  // it repairs them from k_new and v_new.
  __device__ __forceinline__ void loaded(const Segment& segment) const {
    if (!replaces_slot(p.attention) || segment.row_block > 0 || rank != p.cluster - 1) return;
    append_new_tokens<S>(p.attention, segment.keys, threadIdx.x, blockDim.x);
  }

  __device__ __forceinline__ void finish(const Segment& segment, bool more) const {
    if (p.cluster > 1) {
      finish_in_cluster<S>(p.attention, p.layout, segment, p.cluster, more);
    } else {
      finish_in_block<S>(p.attention, p.layout, segment);
    }
    if (more || replaces_slot(p.attention)) return;
    append_new_tokens<S>(p.attention, segment.keys, rank * blockDim.x + threadIdx.x, p.cluster * blockDim.x);
  }
};

template <class S>
__global__ void __launch_bounds__(kMaxWarps * 32, 1) decode_stream_kernel(const __grid_constant__ Params p) {
  if (device::kHasClusters && p.cluster > 1) device::cluster_arrive_relaxed();
  if (!p.keys_first) device::grid_dependency_wait();
  Job<S> job = {p, p.cluster > 1 ? device::cluster_rank() : 0};
  run_segments<S, true>(p.attention, p.layout, job.start(), p.keys_first, job);
}

// Blocks per KV head: a short ring is all latency, so half of the GPU is enough and leaves a second block per SM; a
// long one needs every SM. At least two tiles per block.
inline int choose_cluster(int tiles, int heads, int sm_count) {
  const int target = tiles > 64 ? sm_count / heads : sm_count / (2 * heads);
  int cluster = 1;
  while (cluster < 8 && 2 * cluster <= target && 4 * cluster <= tiles) cluster *= 2;
  return cluster;
}

template <class S>
void launch_shape(const AttentionParams& a, void* stream) {
  const device::DeviceInfo& device = device::device_info();
  const device::LaunchOptions& options = device::launch_options();
  const bool modern = device.arch >= 90 && !options.force_plain;
  const int rows = a.num_q_heads / a.num_kv_heads * a.q_len;
  const int heads = a.batch * a.num_kv_heads;
  const int tiles = (a.slots + (a.q_len > 1 || a.slots == 0 ? a.q_len : 0) + kTileKeys - 1) / kTileKeys;

  Params p = {a, {}, (rows + S::kRows - 1) / S::kRows, 1, false};
  if (modern) p.cluster = options.cluster > 0 ? options.cluster : choose_cluster(tiles, heads, device.sm_count);
  const int block_tiles = (tiles + p.cluster - 1) / p.cluster;
  const int max_warps = options.warps > 0 ? std::min(options.warps, kMaxWarps) : kMaxWarps;
  const int rounds = (block_tiles + max_warps - 1) / max_warps;
  int warps = (block_tiles + rounds - 1) / rounds;
  const auto layout = [&] {
    return shared_layout<S>(warps, (block_tiles + warps - 1) / warps, p.row_blocks > 1 ? 2 : 1, p.cluster);
  };
  while (warps > 1 && layout().total > device.shared_bytes) --warps;
  p.layout = layout();

  device::LaunchConfig config = {};
  config.grid = dim3(static_cast<unsigned>(heads * p.cluster));
  config.block = dim3(static_cast<unsigned>(32 * warps));
  config.shared_bytes = p.layout.total;
  config.cluster = p.cluster;
  config.dependent_launch = p.keys_first = modern && options.dependent_launch;
  device::launch(decode_stream_kernel<S>, config, p, stream);
}

template <class Element>
void launch_decode_stream(const AttentionParams& a, void* stream) {
  dispatch_head_dim(a.head_dim, [&](auto head_dim) {
    dispatch_bool(a.num_q_heads / a.num_kv_heads * a.q_len > 8, [&](auto two_row_tiles) {
      launch_shape<Shape<Element, head_dim.value, two_row_tiles.value ? 2 : 1>>(a, stream);
    });
  });
}

}  // namespace zigzag::decode_stream
