#include "kernels/decode/plan.h"

#include <algorithm>

#include "kernels/attention.h"

namespace zigzag::attend {
namespace {

constexpr int ceil_div(int x, int y) { return (x + y - 1) / y; }

// Loads under way that a GPU's memory wants, as the time in which it delivers so much, in ns. Clusters of 16 blocks of
// 4 warps have 4 MB under way for 4 KV heads: enough for 3.35 TB/s (H100: 67 MB in 27.5 us, clusters of 8 would take
// twice as many SMs), too little for 4.8 TB/s (H200: 268 MB in 83.7 us, a pure read 59). So between 870 and 1250.
constexpr int64_t kLatency = 1200;

// Clusters that a KV head may need beyond one, by what a row of its capacity has: every warp gets a tile.
int most_spread(const DecodeRequest& request, const DecodePlan& plan) {
  const int tiles = request.slots / kTileKeys + 1;
  return std::min(kMaxSpread, ceil_div(tiles, plan.cluster * plan.warps));
}

// A plan for teams of `team` blocks, in clusters or (1) without; team 0: runs of `blocks` blocks.
DecodePlan full_plan(const DecodeRequest& request, const cuda::DeviceFacts& device, const cuda::LaunchOptions& options,
                     int team, int cluster, int blocks) {
  DecodePlan plan;
  plan.row_blocks = request.row_blocks();
  plan.team = team, plan.cluster = cluster, plan.spread = cluster > 1 ? team / cluster : 1;
  // Twice the blocks of a head merge twice the partials, each of half as many warps: measured faster, on an H100 (64/4
  // heads, 4K and 32K tokens: 9.3 / 29.2 us with 8 warps, 8.3 / 28.6 with 4).
  const int most = cluster > 8 ? kMaxWarps / 2 : kMaxWarps;
  plan.warps = options.warps > 0 ? std::min(options.warps, kMaxWarps) : most;
  const auto layout = [&] { return shared_layout(request.block, plan.warps, request.block.stages(), cluster); };
  while (plan.warps > 1 && layout().total > device.shared_bytes()) --plan.warps;
  plan.layout = layout();
  plan.grid[0] = team > 0 ? team : std::min(blocks, kMaxBlocks);
  if (team > 0) plan.grid[1] = request.num_kv_heads * plan.row_blocks, plan.grid[2] = request.batch;
  plan.one_token = team > 1 && request.q_len == 1 && plan.row_blocks == 1 && !request.block.has_codes();
  return plan;
}

int64_t bytes_under_way(const DecodeRequest& request, const DecodePlan& plan) {
  return int64_t{plan.blocks()} * plan.warps * plan.layout.stages * request.block.stage_bytes();
}

// Blocks that share out runs: one per SM, or a few fewer if every head of every row then has whole blocks or every
// block whole heads, as far as rows are equally long. A block that ends within a head has partial results to merge. (8
// rows of 32K on an H100: 353.5 -> 349.6 us.)
int run_blocks(const DecodeRequest& request, int sm_count) {
  const int groups = request.batch * request.num_kv_heads;
  // Several row blocks read the same keys: aligned runs, at the same time, were slower (8 new tokens over 32K on an
  // H100: 55.7 -> 57.5 us).
  if (request.row_blocks() > 1) return sm_count;
  for (int blocks = sm_count; blocks >= sm_count * 19 / 20; --blocks) {
    if (blocks % groups == 0 || groups % blocks == 0) return blocks;
  }
  return sm_count;
}

}  // namespace

DecodePlan plan_full(const DecodeRequest& request, const cuda::DeviceFacts& device, const cuda::LaunchOptions& options,
                     const ClusterPlaces& places) {
  const int groups = request.batch * request.num_kv_heads * request.row_blocks();
  const auto with = [&](int team, int cluster, int blocks = 0) {
    return full_plan(request, device, options, team, cluster, blocks);
  };
  const auto fits = [&](const DecodePlan& plan) {
    return plan.blocks() <= std::min(device.sm_count, kMaxBlocks) && groups * plan.spread <= places(plan);
  };
  const bool has_clusters = device.arch >= 90 && !options.force_plain && options.cluster != 1;
  if (has_clusters && (options.cluster > 1 || options.spread > 0)) {
    for (const int cluster : {8, 4, 2, 16}) {
      if (options.cluster > 1 && options.cluster != cluster) continue;
      const DecodePlan plan = with(cluster * std::max(1, options.spread), cluster);
      if (fits(plan)) return plan;
    }
  }
  const bool decides = has_clusters && options.cluster == 0 && options.spread == 0 && request.batch == 1;

  // Blocks on at least nearly half of the SMs saturate the memory (in clusters of 2 they do not: 32/32 heads on an H100
  // 178.7 -> 180.4 us at 32K tokens, 697 -> 727 at 128K), if they have enough loads under way; a second wave of
  // clusters would not. 16 comes last, for few row groups: few places of a GPU take such a cluster, and its blocks of
  // half the warps share SMs. Two kinds of work want nearly all SMs to themselves: codes become operands first, and
  // several row blocks read the same keys (8 new tokens over 32K on an H100: clusters of 4 on half of the SMs 66.6 us,
  // all SMs 53.8).
  const int64_t wanted = kLatency * device.bandwidth;
  const bool computes = request.block.has_codes() || request.row_blocks() > 1;
  const int nearly_all = device.sm_count * 9 / 10, least = computes ? nearly_all : device.sm_count * 4 / 9;
  for (const int cluster : {8, 4, 16}) {
    if (!decides || (computes && cluster > 8)) continue;
    const DecodePlan plan = with(cluster, cluster);
    if (plan.blocks() >= least && bytes_under_way(request, plan) >= wanted && fits(plan)) return plan;
  }

  const int team = std::min(device.sm_count, kMaxBlocks) / groups;
  const bool fills = request.batch == 1 && options.blocks == 0 && team * groups >= nearly_all;
  // The last block of a team that merges through memory reads what all others have: of 132 blocks and 8 query rows 540
  // KB, which take one SM 5 us and more (8/1 heads on an H200: 9.7, 15.5 and 26.2 us at 8K, 32K and 128K tokens, a pure
  // read 2.7, 5.3 and 16). So teams of more than 16 blocks give way to several clusters per row group.
  if (decides && options.blocks == 0 && !(fills && team <= kMaxCluster)) {
    DecodePlan best;
    for (const int cluster : {8, 4, 16}) {
      if (groups * cluster > device.sm_count || (computes && cluster > 8)) continue;
      const DecodePlan one = with(cluster, cluster);
      const int64_t each = bytes_under_way(request, one);
      const int enough = std::max(ceil_div(least, one.blocks()), static_cast<int>((wanted + each - 1) / each));
      const int most = most_spread(request, one);  // by the capacity
      int spread = std::min(computes ? device.sm_count / one.blocks() : enough, most);
      while (spread > 0 && !fits(with(cluster * spread, cluster))) --spread;
      if (spread == 0) continue;
      const DecodePlan plan = with(cluster * spread, cluster);
      if (!computes && spread >= std::min(enough, most)) return plan;
      // Fewer than that where a GPU's parts have no place for more clusters: still better than a merge through one SM.
      if ((spread == most || plan.blocks() >= least * 3 / 4) && plan.blocks() > best.blocks()) best = plan;
    }
    if (best.cluster > 1) return best;
  }
  if (fills) return with(team, 1);
  return with(0, 1, options.blocks > 0 ? options.blocks : run_blocks(request, device.sm_count));
}

DecodePlan plan_rows(const DecodeRequest& request, int tile_rows, int shared_bytes, const cuda::DeviceFacts& device,
                     const cuda::LaunchOptions& options, const ClusterPlaces& places) {
  const int row_tiles = ceil_div(request.group * request.q_len, tile_rows);
  const int groups = request.batch * request.num_kv_heads * row_tiles;
  DecodePlan best;
  // The products of many rows want all SMs. Of equally many blocks the largest clusters merge least through memory.
  for (const int cluster : {8, 4, 2}) {
    if (options.cluster > 0 && options.cluster != cluster) continue;
    const int spread = options.spread > 0 ? options.spread : kMaxSpread;
    DecodePlan plan;
    plan.row_blocks = row_tiles, plan.warps = kMaxWarps, plan.cluster = cluster;
    plan.layout.total = shared_bytes;
    plan.grid[1] = request.num_kv_heads * row_tiles, plan.grid[2] = request.batch;
    for (plan.spread = std::min(spread, device.sm_count / (groups * cluster)); plan.spread > 0; --plan.spread) {
      plan.team = plan.grid[0] = cluster * plan.spread;
      if (groups * plan.spread <= places(plan)) break;
    }
    if (plan.spread > 0 && plan.blocks() > (best.cluster > 1 ? best.blocks() : 0)) best = plan;
  }
  return best;
}

namespace {

constexpr int kHiddenSlots = 64;  // four tiles: on top of a ring of 320 slots they cost less than to wait first

// Whether all slots of a ring with slack have memory, whatever the lengths, and are about as many as the window's: then
// the list of one new token can be that of the slots, whose loads need no length.
bool has_all_slots(const DecodeRequest& request) {
  return request.slots - request.sink - request.window <= kHiddenSlots && !request.by_rows &&
         request.slots <= readable_slots(0, request.batch, request.num_kv_heads);
}

// Blocks per KV head: a short ring is all latency, so half of the GPU is enough and leaves a second block per SM; a
// long one needs every SM. At least two tiles per block.
int ring_cluster(int tiles, int heads, int sm_count) {
  const int target = tiles > 64 ? sm_count / heads : sm_count / (2 * heads);
  int cluster = 1;
  while (cluster < kMaxRingCluster && 2 * cluster <= target && 4 * cluster <= tiles) cluster *= 2;
  return cluster;
}

}  // namespace

DecodePlan plan_ring(const DecodeRequest& request, const cuda::DeviceFacts& device, const cuda::LaunchOptions& options,
                     const ClusterPlaces& places) {
  const int heads = request.batch * request.num_kv_heads;
  const bool has_clusters = device.arch >= 90 && !options.force_plain;
  const bool in_place = !request.block.has_codes() && request.q_len == 1 && request.slots > 0;

  DecodePlan plan;
  plan.row_blocks = request.row_blocks();
  plan.by_position =
      request.slots > 0 && request.slots > request.sink + request.window && !(in_place && has_all_slots(request));
  const int listed =
      (plan.by_position ? request.sink + request.window : request.slots) + (in_place ? 0 : request.q_len);
  const int tiles = ceil_div(listed, kTileKeys);
  if (has_clusters) {
    plan.cluster =
        options.cluster > 0 ? std::min(options.cluster, kMaxRingCluster) : ring_cluster(tiles, heads, device.sm_count);
  }
  plan.team = plan.grid[0] = plan.cluster;
  plan.grid[1] = request.num_kv_heads, plan.grid[2] = request.batch;
  plan.one_token = in_place && has_clusters && plan.row_blocks == 1 && !plan.by_position;

  // Shares the tiles out to at most `most` warps of each block, and lays out their shared memory.
  const auto share_out = [&](int most) {
    const int block_tiles = ceil_div(tiles, plan.cluster);
    if (options.warps > 0) most = std::min(options.warps, kMaxWarps);
    plan.warps = ceil_div(block_tiles, ceil_div(block_tiles, most));
    const auto layout = [&] {
      return shared_layout(request.block, plan.warps, ceil_div(block_tiles, plan.warps), plan.cluster);
    };
    while (plan.warps > 1 && layout().total > device.shared_bytes()) --plan.warps;
    plan.layout = layout();
  };
  share_out(kMaxWarps);
  const bool fits = plan.cluster > 1 ? heads <= places(plan) : heads <= device.sm_count;
  if (!fits) {
    // Blocks of all warps, one an SM, would not run all at once: where two of half the warps fit, they share an SM, and
    // one loads while the other merges (64 rows of 64 + 256 tokens on an H100: 35.8 -> 32.7 us). An SM has as much as
    // one block may ask for, and 1 KB more.
    share_out(kMaxWarps / 2);
    if (2 * (plan.layout.total + 1024) > device.shared_bytes()) share_out(kMaxWarps);
  }
  return plan;
}

}  // namespace zigzag::attend
