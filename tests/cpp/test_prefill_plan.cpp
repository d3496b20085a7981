// Which kernel takes a chunk, and how its keys are spread: by what must hold of every plan. And the layout of its
// tiles.
#include <doctest/doctest.h>

#include <climits>
#include <set>
#include <vector>

#include "core/error.h"
#include "kernels/attention.h"
#include "kernels/decode/full/workspace.h"
#include "kernels/decode/known_devices.h"
#include "kernels/prefill/pipeline_plan.h"
#include "kernels/prefill/swizzle.h"

using namespace zigzag;
using namespace zigzag::prefill;

namespace {

const int64_t kScratch = attention_workspace_bytes() - decode_full::kCounterBytes;

PrefillRequest request(int num_q_heads, int num_kv_heads, int q_len, int slots, int head_dim = 128, int batch = 1,
                       KvFormats formats = {}, int window = 0) {
  return {batch, num_kv_heads, num_q_heads / num_kv_heads, q_len, head_dim, slots, window, formats};
}

PrefillPlan on_h200(const PrefillRequest& r, const cuda::LaunchOptions& options = {}) {
  return plan_prefill(r, attend::known_device("H200").facts, options, kScratch);
}

}  // namespace

TEST_CASE("prefill plan: every row has a tile, every part a place in the workspace, no more blocks than run at once") {
  for (const attend::KnownDevice& device : attend::known_devices()) {
    for (const int num_kv_heads : {1, 2, 4, 8, 32}) {
      for (const int group : {1, 4, 7, 8, 16}) {
        for (const int head_dim : kHeadDims) {
          for (const int q_len : {17, 32, 33, 512, 100000}) {
            for (const int batch : {1, 3, 64}) {
              for (const int slots : {0, 1, 4096, 1 << 20, INT_MAX - 4096}) {
                const PrefillRequest r = request(group * num_kv_heads, num_kv_heads, q_len, slots, head_dim, batch);
                const PrefillPlan plan = plan_prefill(r, device.facts, {}, kScratch);
                INFO(device.name, " heads ", num_kv_heads, " group ", group, " head_dim ", head_dim, " q_len ", q_len,
                     " batch ", batch, " slots ", slots, ": ", plan.tiles, " tiles, ", plan.splits, " splits");
                const bool serves = device.facts.arch == 90 && (head_dim == 64 || head_dim == 128);
                REQUIRE((plan.kernel == PrefillKernel::kPipeline) == serves);
                CHECK(plan.splits >= 1);
                if (!serves) continue;
                CHECK(plan.tiles * kPipelineRows >= int64_t{batch} * num_kv_heads * group * q_len);
                if (plan.splits == 1) continue;
                CHECK(plan.tiles * plan.splits <= device.facts.sm_count);
                CHECK(plan.tiles * plan.splits * pipeline_part_bytes(head_dim) <= kScratch);
                CHECK(int64_t{plan.splits} * kPipelineKeys <= int64_t{slots} + q_len);
              }
            }
          }
        }
      }
    }
  }
}

TEST_CASE("prefill plan: short chunks on long caches use nearly all multiprocessors") {
  for (const int q_len : {17, 32, 64, 128, 256, 512}) {
    const PrefillPlan plan = on_h200(request(32, 8, q_len, 32768));
    INFO(q_len, " tokens: ", plan.tiles, " tiles, ", plan.splits, " splits");
    CHECK(plan.tiles * plan.splits >= 128);
  }
  CHECK(on_h200(request(32, 8, 512, 32768)).splits == 1);
  CHECK(on_h200(request(8, 1, 17, 32768)).splits == 66);
  // As many as have two steps each; the capacity is what the host knows of the length.
  CHECK(on_h200(request(32, 8, 17, 1024)).splits == 4);
  CHECK(on_h200(request(32, 8, 17, 100)).splits == 1);
}

TEST_CASE("prefill plan: codes, rings and overrides") {
  const KvFormats int8_int4 = {KvFormat::kInt8, KvFormat::kInt4}, fp8 = {KvFormat::kFp8, KvFormat::kFp8};
  const auto kernel = [](const PrefillRequest& r, const cuda::LaunchOptions& options = {}) {
    return on_h200(r, options).kernel;
  };
  CHECK(kernel(request(32, 8, 64, 4096, 64, 1, fp8)) == PrefillKernel::kPipeline);
  CHECK(kernel(request(32, 8, 64, 4096, 64, 1, int8_int4)) == PrefillKernel::kPipeline);
  CHECK(kernel(request(32, 8, 64, 4096, 64, 1, {KvFormat::kFp8, KvFormat::kPlain})) == PrefillKernel::kTiles);
  CHECK(kernel(request(32, 8, 64, 4096, 64, 1, {KvFormat::kInt4, KvFormat::kInt8})) == PrefillKernel::kTiles);
  CHECK(kernel(request(32, 8, 64, 4096, 64, 1, {}, 256)) == PrefillKernel::kTiles);
  CHECK(kernel(request(32, 8, 64, 4096, 256)) == PrefillKernel::kTiles);

  cuda::LaunchOptions plain, tiles, three, many;
  plain.force_plain = true, tiles.prefill_tiles = true, three.prefill_splits = 3, many.prefill_splits = 160;
  CHECK(kernel(request(32, 8, 64, 4096), plain) == PrefillKernel::kTiles);
  CHECK(kernel(request(32, 8, 64, 4096), tiles) == PrefillKernel::kTiles);
  CHECK(on_h200(request(32, 8, 64, 4096), three).splits == 3);
  const PrefillPlan most = on_h200(request(32, 8, 64, 4096), many);  // what the workspace has room for
  CHECK(most.splits > 1);
  CHECK(most.tiles * most.splits * pipeline_part_bytes(128) <= kScratch);
  CHECK(plan_prefill(request(32, 8, 64, 4096), attend::known_device("H200").facts, three, -8192).splits == 1);
}

TEST_CASE("prefill tiles: a piece lies where the 128-byte swizzle of its plain address is, and nowhere else") {
  for (const int rows : {64, 128}) {
    std::set<int> places;
    for (int row = 0; row < rows; ++row) {
      for (int piece = 0; piece < 16; ++piece) {
        const int plain = (piece / 8 * rows + row) * kSwizzledRowBytes + piece % 8 * 16;
        const int swizzled = plain ^ (plain >> 7 & 7) << 4;
        CHECK(swizzled_piece(rows, row, piece) == swizzled);
        places.insert(swizzled);
      }
    }
    CHECK(places.size() == static_cast<size_t>(rows) * 16);
  }
}
