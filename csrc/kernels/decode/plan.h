// How a decode launch spreads over the GPU: a pure function of the shape and of what is known of the device, without
// CUDA. docs/decode_kernel.md tells what the ways are.
//
// Full caches. Ways to spread a (batch, KV head, row block) -- a row group -- over blocks:
//
//   team      as many blocks for each row group, where that leaves few SMs idle. For one row only: each row of a batch
//             would get the same number of blocks, however different their lengths
//   runs      the tiles of all row groups, laid end to end, are cut into equal runs, one per block: equal lengths give
//             runs that align with the row groups, ragged batches stay balanced
//
// and ways to make one result of a row group's parts:
//
//   cluster   through distributed shared memory: fastest where teams of 4 to 16 blocks fill nearly half of the GPU and
//             need no second wave
//   clusters  each as above; then the warp that comes last merges what the clusters of a team have of its share of the
//             output, through the workspace: for few row groups, whose one cluster each would not fill the GPU
//   memory    through the workspace: the block that comes last merges, in block order
//
// Rings: the blocks of a cluster share one (batch, KV head); without clusters one block takes it all.
//
// Lengths are known to the device alone, so that decisions rest on the geometry; of lengths they know the capacity.
#pragma once

#include <functional>

#include "core/params.h"
#include "cuda/device_facts.h"
#include "kernels/decode/geometry.h"

namespace zigzag::attend {

// What a launch is asked to do.
struct DecodeRequest {
  BlockShape block;
  int batch, num_kv_heads, group, q_len;
  int slots, sink, window;  // as in AttentionParams; window 0: a full cache
  bool by_rows;             // the call has cache_rows

  constexpr int row_blocks() const { return (group * q_len + block.rows() - 1) / block.rows(); }
};

struct DecodePlan {
  int row_blocks = 1;        // per KV head
  int team = 0;              // blocks along grid.x that share a row group; 0: runs
  int cluster = 1;           // blocks per cluster along grid.x; 1: no clusters
  int spread = 1;            // clusters of a team
  int warps = 0;             // per block
  int grid[3] = {1, 1, 1};   // blocks
  bool one_token = false;    // by the kernel for one new token, which asks for tiles before it knows the length
  bool by_position = false;  // of a ring: its keys are listed by position
  SharedLayout layout = {};

  constexpr int blocks() const { return grid[0] * grid[1] * grid[2]; }
  // How one result is made of what the blocks of a row group have.
  constexpr const char* merge() const {
    if (cluster > 1) return spread == 1 ? "cluster" : "clusters";
    return team == 1 ? "none" : "memory";
  }
};

// How many clusters of a plan (its cluster, warps, layout, one_token) run on the GPU at once: depends on how its SMs
// are grouped and on the kernel's registers. 0 where it has no such clusters.
using ClusterPlaces = std::function<int(const DecodePlan&)>;

// Overrides that the GPU has no place for count as none.
DecodePlan plan_full(const DecodeRequest& request, const cuda::DeviceFacts& device, const cuda::LaunchOptions& options,
                     const ClusterPlaces& places);
DecodePlan plan_ring(const DecodeRequest& request, const cuda::DeviceFacts& device, const cuda::LaunchOptions& options,
                     const ClusterPlaces& places);

// Of the kernel for many query rows over one read of the keys (full/rows_pipeline.cuh), whose blocks serve `tile_rows`
// of them and need `shared_bytes`; cluster 1 where there is no place for it.
DecodePlan plan_rows(const DecodeRequest& request, int tile_rows, int shared_bytes, const cuda::DeviceFacts& device,
                     const cuda::LaunchOptions& options, const ClusterPlaces& places);

inline DecodeRequest decode_request(const AttentionParams& a) {
  const int group = a.num_q_heads / a.num_kv_heads;
  return {{a.head_dim, row_tiles(a.head_dim, group * a.q_len), {a.k_store.format, a.v_store.format}},
          a.batch,
          a.num_kv_heads,
          group,
          a.q_len,
          a.slots,
          a.sink,
          a.window,
          a.cache_rows.of != nullptr};
}

}  // namespace zigzag::attend
