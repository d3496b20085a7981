// Launch decisions over a table of GPUs: by what must hold of every plan, and by what was measured.
#include <doctest/doctest.h>

#include <climits>
#include <string>
#include <vector>

#include "core/error.h"
#include "kernels/decode/full/workspace.h"
#include "kernels/decode/known_devices.h"
#include "kernels/decode/plan.h"

using namespace zigzag;
using namespace zigzag::attend;

namespace {

constexpr KvFormats kPlain = {}, kFp8 = {KvFormat::kFp8, KvFormat::kFp8}, kInt4 = {KvFormat::kInt4, KvFormat::kInt4};

DecodeRequest request(int num_q_heads, int num_kv_heads, int head_dim, int slots, int q_len = 1, int batch = 1,
                      KvFormats formats = {}, int window = 0) {
  const int group = num_q_heads / num_kv_heads;
  const BlockShape block = {head_dim, row_tiles(head_dim, group * q_len), formats};
  return {block, batch, num_kv_heads, group, q_len, slots, window > 0 ? 64 : 0, window, false};
}

DecodePlan plan(const DecodeRequest& r, const KnownDevice& device, const cuda::LaunchOptions& options = {}) {
  const ClusterPlaces places = cluster_places(device);
  return r.window > 0 ? plan_ring(r, device.facts, options, places) : plan_full(r, device.facts, options, places);
}

std::string text(const DecodeRequest& r, const KnownDevice& device, const DecodePlan& p) {
  return concat(device.name, ": ", r.group * r.num_kv_heads, "/", r.num_kv_heads, " d", r.block.head_dim, " q_len ",
                r.q_len, " batch ", r.batch, " slots ", r.slots, " window ", r.window, " formats ",
                name(r.block.formats.k), ": grid ", p.grid[0], " x ", p.grid[1], " x ", p.grid[2], " team ", p.team,
                " cluster ", p.cluster, " spread ", p.spread, " warps ", p.warps, " shared ", p.layout.total);
}

// Whether kernels, workspace and device take the plan.
void check_runs(const DecodeRequest& r, const KnownDevice& device, const DecodePlan& p) {
  INFO(text(r, device, p));
  CHECK(p.layout.total <= device.facts.shared_bytes());
  CHECK(p.warps >= 1);
  CHECK(p.warps <= kMaxWarps);
  CHECK(p.layout.stages >= 1);
  CHECK(p.row_blocks * r.block.rows() >= r.group * r.q_len);
  CHECK((p.cluster == 1 || device.facts.arch >= 90));
  CHECK((p.cluster & (p.cluster - 1)) == 0);
  if (p.cluster > 1) CHECK(p.team == p.cluster * p.spread);
  if (p.one_token) CHECK((r.q_len == 1 && p.row_blocks == 1 && !r.block.has_codes() && (p.team > 1 || r.window > 0)));
  if (r.window > 0) {
    CHECK(p.cluster <= kMaxRingCluster);
    CHECK(p.spread == 1);
    return;
  }
  const int groups = r.batch * r.num_kv_heads * p.row_blocks;
  CHECK(p.cluster <= kMaxCluster);
  CHECK(p.spread <= kMaxSpread);
  if (p.cluster > 1) CHECK(groups * p.spread <= cluster_places(device)(p));
  if (p.cluster > 1 || p.team == 0) CHECK(p.blocks() <= kMaxBlocks);
  if (p.spread > 1) {
    const int64_t units = int64_t{groups} * r.block.rows() * r.block.row_units() * p.spread;
    CHECK(units * (32 + 2) * 4 <= decode_full::workspace_bytes(r.block.head_dim) - decode_full::kCounterBytes);
    CHECK(groups * p.cluster * kMaxWarps * 4 <= decode_full::kCounterBytes);
  }
}

std::vector<DecodeRequest> all_requests() {
  std::vector<DecodeRequest> all;
  for (const int num_kv_heads : {1, 2, 3, 4, 5, 8, 12, 16, 32, 128}) {
    for (const int group : {1, 4, 7, 8, 16}) {
      for (const int head_dim : kHeadDims) {
        for (const int q_len : {1, 2, 8, 16}) {
          for (const int batch : {1, 2, 8, 200}) {
            for (const int slots : {1, 320, 8192, 1 << 17, INT_MAX}) {
              for (const KvFormats formats : {kPlain, kFp8, kInt4}) {
                if (formats.k != KvFormat::kPlain && head_dim != 64 && head_dim != 128) continue;
                all.push_back(request(group * num_kv_heads, num_kv_heads, head_dim, slots, q_len, batch, formats));
                if (slots > 320 || slots < 64 + 256) continue;
                all.push_back(request(group * num_kv_heads, num_kv_heads, head_dim, slots, q_len, batch, formats, 256));
              }
            }
          }
        }
      }
    }
  }
  return all;
}

}  // namespace

TEST_CASE("decode plan: every shape on every GPU fits its shared memory, its clusters and the workspace") {
  const std::vector<DecodeRequest> requests = all_requests();
  const cuda::LaunchOptions none, plain = {true, false, 0, 0, 0, 0}, clusters = {false, false, 4, 3, 0, 0},
                                  large = {false, false, 16, 2, 8, 0}, few = {false, false, 1, 0, 3, 40};
  for (const KnownDevice& device : known_devices()) {
    for (const DecodeRequest& r : requests) {
      for (const cuda::LaunchOptions& options : {none, plain, clusters, large, few}) {
        check_runs(r, device, plan(r, device, options));
      }
    }
  }
}

TEST_CASE(
    "decode plan: one row of many tokens puts nearly half of the SMs to work, more where bytes under way want it") {
  for (const KnownDevice& device : known_devices()) {
    for (const int num_kv_heads : {1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32}) {
      for (const int group : {1, 4, 7, 8, 16}) {
        for (const KvFormats formats : {kPlain, kFp8}) {
          const DecodeRequest r = request(group * num_kv_heads, num_kv_heads, 128, 1 << 17, 1, 1, formats);
          const DecodePlan p = plan(r, device);
          INFO(text(r, device, p));
          CHECK(p.blocks() >= device.facts.sm_count * 4 / 9);
          CHECK(p.blocks() <= device.facts.sm_count);
          if (formats.k != KvFormat::kPlain) continue;
          const int64_t under_way = int64_t{p.blocks()} * p.warps * p.layout.stages * r.block.stage_bytes();
          CHECK(under_way >= int64_t{1200} * device.facts.bandwidth);  // 1.2 us of what the memory delivers
        }
      }
    }
  }
}

TEST_CASE("decode plan: a larger capacity never gets fewer blocks") {
  for (const KnownDevice& device : known_devices()) {
    for (const int num_kv_heads : {1, 2, 4, 8, 32}) {
      for (const KvFormats formats : {kPlain, kInt4}) {
        for (const int window : {0, 1}) {
          int before = 0;
          for (int slots = 80; slots <= 1 << 20; slots = slots * 5 / 4) {
            const DecodeRequest r =
                request(4 * num_kv_heads, num_kv_heads, 128, slots, 1, 1, formats, window * (slots - 64));
            const DecodePlan p = plan(r, device);
            INFO(text(r, device, p));
            CHECK(p.blocks() >= before);
            before = p.blocks();
          }
        }
      }
    }
  }
}

TEST_CASE("decode plan: an H100 runs the measured cells as they were measured") {
  struct Cell {
    DecodeRequest request;
    int blocks, team, cluster, spread, warps;
    bool one_token;
  };
  const int k32K = 32768;
  const std::vector<Cell> cells = {
      {request(32, 8, 128, 4096), 64, 8, 8, 1, 8, true},
      {request(32, 8, 128, 1 << 19), 64, 8, 8, 1, 8, true},
      {request(16, 8, 128, k32K), 64, 8, 8, 1, 8, true},
      {request(40, 8, 128, k32K), 64, 8, 8, 1, 8, true},
      {request(32, 8, 64, k32K), 64, 8, 8, 1, 8, true},
      {request(32, 8, 96, k32K), 64, 8, 8, 1, 8, true},
      {request(32, 8, 256, k32K), 64, 8, 8, 1, 5, true},
      {request(28, 4, 128, k32K), 64, 16, 16, 1, 4, true},
      {request(64, 4, 128, k32K), 64, 16, 16, 1, 4, true},
      {request(32, 16, 128, k32K), 64, 4, 4, 1, 8, true},
      {request(32, 32, 128, 4096), 128, 4, 1, 1, 8, true},
      {request(32, 8, 128, k32K, 4), 64, 8, 8, 1, 7, false},
      {request(32, 8, 128, k32K, 8), 128, 8, 1, 1, 7, false},
      {request(32, 8, 128, 4096, 1, 8), 128, 0, 1, 1, 8, false},
      {request(32, 8, 128, 65536, 1, 32), 128, 0, 1, 1, 8, false},
      {request(32, 8, 128, 4096, 1, 1, kFp8), 128, 16, 1, 1, 8, false},
      {request(32, 8, 128, 1 << 17, 1, 1, kInt4), 128, 16, 1, 1, 8, false},
      {request(32, 8, 128, k32K, 1, 8, kFp8), 128, 0, 1, 1, 8, false},
      // Rings of 64 + 256: one row, 8, 64; 64 + 1024.
      {request(32, 8, 128, 320, 1, 1, {}, 256), 64, 8, 8, 1, 3, true},
      {request(32, 8, 128, 320, 1, 8, {}, 256), 64, 1, 1, 1, 7, true},
      {request(32, 8, 128, 320, 1, 64, {}, 256), 512, 1, 1, 1, 4, true},
      {request(32, 8, 128, 1088, 1, 1, {}, 1024), 64, 8, 8, 1, 5, true},
  };
  for (const Cell& cell : cells) {
    const DecodePlan p = plan(cell.request, known_device("H100"));
    INFO(text(cell.request, known_device("H100"), p));
    CHECK(p.blocks() == cell.blocks);
    CHECK(p.team == cell.team);
    CHECK(p.cluster == cell.cluster);
    CHECK(p.spread == cell.spread);
    CHECK(p.warps == cell.warps);
    CHECK(p.one_token == cell.one_token);
  }
}

TEST_CASE("decode plan: few KV heads take several clusters where one has too little under way") {
  for (const int num_kv_heads : {1, 2, 4}) {
    for (const int group : {4, 8, 16}) {
      const DecodePlan p = plan(request(group * num_kv_heads, num_kv_heads, 128, 1 << 17), known_device("H200"));
      CHECK(p.spread > 1);
      CHECK(std::string(p.merge()) == "clusters");
      CHECK(p.one_token);
    }
  }
  CHECK(plan(request(32, 8, 128, 1 << 17), known_device("H200")).spread == 1);
  // A capacity that gives no second cluster a tile.
  CHECK(plan(request(8, 1, 128, 512), known_device("H200")).spread == 1);
}

TEST_CASE("decode plan: many query rows over one read of the keys take nearly all SMs and find room in the workspace") {
  for (const char* name : {"H100", "H200"}) {
    const KnownDevice& device = known_device(name);
    for (const int num_kv_heads : {1, 2, 3, 4, 5, 8, 16, 30, 40, 80}) {
      for (const int head_dim : {64, 128}) {
        for (const int rows : {32, 64, 112, 128, 256}) {
          const DecodeRequest r = request(16 * num_kv_heads, num_kv_heads, head_dim, 1 << 17, rows / 16);
          const int tile_rows = rows <= 64 ? 64 : 128, groups = num_kv_heads * ((rows + tile_rows - 1) / tile_rows);
          const DecodePlan p = plan_rows(r, tile_rows, 224 * 1024, device.facts, {}, cluster_places(device));
          INFO(text(r, device, p));
          if (p.cluster == 1) {
            CHECK(groups > 60);
            continue;
          }
          CHECK(p.blocks() == p.team * groups);
          CHECK(p.blocks() <= device.facts.sm_count);
          CHECK((groups > 12 || p.blocks() >= device.facts.sm_count * 8 / 10));
          CHECK(groups * p.spread <= cluster_places(device)(p));
          CHECK(int64_t{groups} * tile_rows * p.spread * (head_dim + 2) * 4 <=
                decode_full::workspace_bytes(head_dim) - decode_full::kCounterBytes);
          CHECK(groups * p.cluster * 4 <= decode_full::kCounterBytes);
        }
      }
    }
  }
}

TEST_CASE("decode plan: overrides that the GPU has a place for are taken") {
  const DecodeRequest r = request(32, 4, 128, 1 << 17);
  const auto with = [&](const char* device, const cuda::LaunchOptions& options) {
    return plan(r, known_device(device), options);
  };
  for (const auto& [cluster, spread] : std::vector<std::pair<int, int>>{{8, 1}, {8, 3}, {4, 7}, {2, 8}, {16, 1}}) {
    const DecodePlan p = with("H200", {false, false, cluster, spread, 0, 0});
    CHECK(p.cluster == cluster);
    CHECK(p.spread == spread);
  }
  CHECK(with("H200", {false, false, 16, 1, 8, 0}).warps == 8);
  CHECK(with("H200", {false, false, 8, 16, 0, 0}).cluster == 1);  // 64 clusters of 8 find no place
  CHECK(with("A100", {false, false, 8, 2, 0, 0}).cluster == 1);
  CHECK(with("H200", {true, false, 8, 2, 0, 0}).cluster == 1);
  CHECK(with("H200", {false, false, 1, 0, 0, 0}).team == 33);
  const DecodePlan runs = with("H200", {false, false, 1, 0, 0, 100});
  CHECK(runs.team == 0);
  CHECK(runs.blocks() == 100);
}

TEST_CASE("decode plan: an unknown GPU is an error that names the known ones") {
  CHECK(std::string(known_device("h200").name) == "H200");
  CHECK_THROWS_WITH_AS(known_device("V100"),
                       "GPU 'V100' is not known; known: A100, RTX3090, RTX4090, H100, H200, B200, RTX5090", Error);
}
