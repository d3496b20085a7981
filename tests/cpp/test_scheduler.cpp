// The plan's checks, the scheduler's tables and accounting, and steps through real kernels against attention over the
// whole history.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "engine/captured_step.h"
#include "engine/scheduler.h"
#include "error_text.h"
#include "kv/formats.h"
#include "kv/ring.h"

namespace {

using namespace zigzag;
using zigzag::testing::error_of;

constexpr LayerKind R = LayerKind::kRetrieval;
constexpr LayerKind S = LayerKind::kStreaming;

Strides contiguous(int heads, int tokens, int head_dim) {
  return {int64_t{heads} * tokens * head_dim, int64_t{tokens} * head_dim, head_dim};
}

std::vector<float> random_values(std::mt19937& random, std::size_t size) {
  std::normal_distribution<float> normal;
  std::vector<float> values(size);
  for (float& value : values) value = normal(random);
  return values;
}

// Per-layer state of a model that decodes on the CPU in float32, and everything its layers ever saw.
struct Layer {
  std::vector<float> k_cache, v_cache;   // [batch, num_kv_heads, slots, head_dim]
  std::vector<float> k_new, v_new;       // [batch, num_kv_heads, q_len, head_dim]
  std::vector<float> out, lse;           // [batch, num_q_heads, q_len(, head_dim)]
  std::vector<std::vector<float>> k, v;  // [position] -> [batch, num_kv_heads, head_dim]
};

struct Model {
  static constexpr int kBatch = 2, kCapacity = 64;
  static constexpr float kScale = 0.2f;
  ModelGeometry geometry{4, 2, 64, DType::kFloat32};
  LayerPlan plan{{S, R, S}, 2, 5};
  Scheduler scheduler{plan, geometry};
  std::vector<Layer> layers{3};
  std::vector<int32_t> seq_lens = std::vector<int32_t>(kBatch, 0);
  std::vector<float> q;  // of layer 0; a later layer takes the output of the layer before as its queries
  std::vector<int> visited;
  RowMap cache_rows = {};

  Model() {
    for (int l = 0; l < scheduler.num_layers(); ++l) {
      const std::size_t size =
          kBatch * geometry.num_kv_heads * scheduler.caches(l)[0].slots(kCapacity) * geometry.head_dim;
      // Slots that were never written must not matter.
      layers[l].k_cache.assign(size, std::numeric_limits<float>::quiet_NaN());
      layers[l].v_cache = layers[l].k_cache;
    }
  }

  const std::vector<float>& queries(int l) const { return l == 0 ? q : layers[l - 1].out; }

  LayerTensors tensors(int l, int q_len) {
    Layer& layer = layers[l];
    visited.push_back(l);
    const Strides new_stride = contiguous(geometry.num_kv_heads, q_len, geometry.head_dim);
    const Strides q_stride = contiguous(geometry.num_q_heads, q_len, geometry.head_dim);
    LayerTensors t{queries(l).data(), layer.k_new.data(), layer.v_new.data(), layer.out.data(), layer.lse.data(),
                   q_stride,          new_stride,         new_stride,         q_stride,         kScale};
    CacheTensors& cache = t.caches[0];
    cache.k = layer.k_cache.data();
    cache.v = layer.v_cache.data();
    cache.k_stride = cache.v_stride =
        contiguous(geometry.num_kv_heads, static_cast<int>(scheduler.caches(l)[0].slots(kCapacity)), geometry.head_dim);
    cache.capacity = kCapacity;
    return t;
  }

  // `order`: batch row b gets the numbers that row order[b] would get without it.
  void step(std::mt19937& random, int q_len, const std::vector<int>& order = {0, 1}) {
    const std::size_t tokens = static_cast<std::size_t>(kBatch) * q_len, head_dim = geometry.head_dim;
    const auto values = [&](std::size_t size) {
      const std::vector<float> drawn = random_values(random, size);
      std::vector<float> ordered;
      for (const int row : order) {
        const auto from = drawn.begin() + static_cast<std::ptrdiff_t>(row * size / kBatch);
        ordered.insert(ordered.end(), from, from + static_cast<std::ptrdiff_t>(size / kBatch));
      }
      return ordered;
    };
    q = values(tokens * geometry.num_q_heads * head_dim);
    for (Layer& layer : layers) {
      layer.k_new = values(tokens * geometry.num_kv_heads * head_dim);
      layer.v_new = values(tokens * geometry.num_kv_heads * head_dim);
      layer.out.assign(tokens * geometry.num_q_heads * head_dim, -1.0f);
      layer.lse.assign(tokens * geometry.num_q_heads, -1.0f);
      remember(layer.k, layer.k_new, q_len);
      remember(layer.v, layer.v_new, q_len);
    }
    visited.clear();
    Step shared{kBatch, q_len, seq_lens.data()};
    shared.cache_rows = cache_rows;
    scheduler.step_cpu(shared, [&](int l) { return tensors(l, q_len); }, ParallelFor{});
  }

  void remember(std::vector<std::vector<float>>& history, const std::vector<float>& chunk, int q_len) const {
    const int rows = kBatch * geometry.num_kv_heads, head_dim = geometry.head_dim;
    for (int i = 0; i < q_len; ++i) {
      std::vector<float> token(static_cast<std::size_t>(rows) * head_dim);
      for (int row = 0; row < rows; ++row) {
        for (int d = 0; d < head_dim; ++d) token[row * head_dim + d] = chunk[(row * q_len + i) * head_dim + d];
      }
      history.push_back(token);
    }
  }

  // Largest error of a layer's output and log-sum-exp against float64 attention over every token the layer ever saw.
  double error(int l, int q_len) const {
    const Layer& layer = layers[l];
    const CacheSpec& spec = scheduler.caches(l)[0];
    const RingLayout ring{spec.sink, spec.window, 0};
    const int heads = geometry.num_q_heads, group = heads / geometry.num_kv_heads, head_dim = geometry.head_dim;
    double worst = 0;
    for (int row = 0; row < kBatch * heads; ++row) {
      for (int i = 0; i < q_len; ++i) {
        const int query = seq_lens[0] + i;
        const std::size_t kv =
            static_cast<std::size_t>(row / heads * geometry.num_kv_heads + row % heads / group) * head_dim;
        const float* q_row = queries(l).data() + (static_cast<std::size_t>(row) * q_len + i) * head_dim;
        std::vector<double> expected(head_dim, 0.0);
        double sum = 0;
        for (int key = 0; key <= query; ++key) {
          if (!ring.visible(key, query)) continue;
          double logit = 0;
          for (int d = 0; d < head_dim; ++d) logit += double{q_row[d]} * layer.k[key][kv + d] * kScale;
          sum += std::exp(logit);
          for (int d = 0; d < head_dim; ++d) expected[d] += std::exp(logit) * layer.v[key][kv + d];
        }
        const std::size_t at = static_cast<std::size_t>(row) * q_len + i;
        worst = std::fmax(worst, std::isnan(layer.lse[at]) ? INFINITY : std::abs(layer.lse[at] - std::log(sum)));
        for (int d = 0; d < head_dim; ++d) {
          const float got = layer.out[at * head_dim + d];
          worst = std::fmax(worst, std::isnan(got) ? INFINITY : std::abs(got - expected[d] / sum));
        }
      }
    }
    return worst;
  }
};

}  // namespace

TEST_CASE("LayerPlan: valid by construction") {
  const LayerPlan plan({R, S}, 0, 1);
  CHECK(plan.num_layers() == 2);
  CHECK(plan.sink() == 0);
  CHECK(plan.window() == 1);
  const int64_t most = std::numeric_limits<int32_t>::max();
  CHECK_NOTHROW(LayerPlan({S}, most - 1, 1));
  CHECK(error_of([] { LayerPlan({}, 4, 8); }) == "a plan needs at least one layer, got none");
  CHECK(error_of([] { LayerPlan({R}, -1, 8); }).find("sink must be >= 0 tokens, got -1") != std::string::npos);
  CHECK(error_of([] { LayerPlan({R}, 4, 0); }).find("window must be >= 1") != std::string::npos);
  CHECK(error_of([&] { LayerPlan({S}, most, 1); }).find("at most 2147483647 tokens") != std::string::npos);
  CHECK(error_of([] { LayerPlan({S}, int64_t{1} << 62, int64_t{1} << 62); }).find("sink + window") !=
        std::string::npos);
}

TEST_CASE("parse_head_kinds: the names of the kinds, and nothing else") {
  const std::vector<HeadKinds> layers = parse_head_kinds({{name(S)}, {name(R), name(S)}, {name(R), name(R)}});
  CHECK(layers[0].kinds == std::vector<LayerKind>{S});
  CHECK(layers[1].kinds == std::vector<LayerKind>{R, S});
  CHECK(std::vector<bool>{layers[0].mixed(), layers[1].mixed(), layers[2].mixed()} ==
        std::vector<bool>{false, true, false});
  CHECK(error_of([] { parse_head_kinds({{"retrieval"}, {"full"}}); }) ==
        "layer 1 has the kind \"full\"; supported: retrieval, streaming, native, state");
  CHECK(error_of([] { parse_head_kinds({{"retrieval", "full"}}); }) ==
        "layer 0 has a KV head of the kind \"full\"; supported: retrieval, streaming, native, state");
  CHECK(error_of([] { parse_head_kinds({{"retrieval"}, {}}); }) == "layer 1 has no KV heads");
}

TEST_CASE("LayerPlan: mixed layers agree on the number of KV heads, whole layers fit any") {
  CHECK(LayerPlan({R, S}, 4, 8).num_kv_heads() == 0);
  CHECK(LayerPlan({R, HeadKinds({R, S, S})}, 4, 8).num_kv_heads() == 3);
  CHECK(error_of([] {
          LayerPlan({HeadKinds({R, S}), R, HeadKinds({R, S, S})}, 4, 8);
        }).find("one number of KV heads; layer 2 names 3, an earlier one 2") != std::string::npos);
}

TEST_CASE("Scheduler: a layer's kernel and slots follow its kind") {
  const Scheduler scheduler(LayerPlan({R, S}, 64, 256), {32, 8, 128, DType::kBFloat16});
  CHECK(scheduler.num_layers() == 2);
  CHECK(scheduler.launches_per_step() == 2);
  const CacheSpec &full = scheduler.caches(0)[0], &ring = scheduler.caches(1)[0];
  CHECK(full.kernel(1) == AttentionKernel::kDecodeFull);
  CHECK(ring.kernel(1) == AttentionKernel::kDecodeStream);
  CHECK(full.kernel(1000) == AttentionKernel::kPrefill);
  CHECK(ring.kernel(1000) == AttentionKernel::kPrefill);
  CHECK(full.slots(100) == 100);
  CHECK(ring.slots(100) == 320);
  CHECK(ring.slots(int64_t{1} << 40) == 320);
  CHECK(error_of([&] { scheduler.caches(2); }) == "layer 2 does not exist; the plan has layers 0 to 1");
  CHECK(error_of([&] { scheduler.caches(-1); }).find("layer -1") != std::string::npos);
}

TEST_CASE("Scheduler: a mixed layer has a cache per kind, each with its heads, and a launch for each") {
  const ModelGeometry geometry{12, 3, 64, DType::kFloat16, {}, {KvFormat::kInt8, KvFormat::kInt4}};
  const Scheduler scheduler(LayerPlan({S, HeadKinds({S, R, S}), R}, 4, 8), geometry, 5);
  CHECK(scheduler.launches_per_step() == 4);
  const std::vector<CacheSpec>& caches = scheduler.caches(1);
  REQUIRE(caches.size() == 2);
  CHECK(caches[0].kind == R);
  CHECK(caches[0].heads == std::vector<int32_t>{1});
  CHECK(caches[0].slots(100) == 100);
  CHECK(caches[1].kind == S);
  CHECK(caches[1].heads == std::vector<int32_t>{0, 2});
  CHECK(caches[1].slots(100) == 4 + 8 + 5);
  CHECK(scheduler.caches(0)[0].heads.empty());
  CHECK(scheduler.kv_bytes(2, 100).retrieval == 2 * 100 * (1 + 3) * (2 * 64 * 2));
  CHECK(scheduler.kv_bytes(2, 100).streaming == 2 * 17 * (3 + 2) * (64 + 4 + 32 + 4));
  CHECK(error_of([&] { Scheduler(LayerPlan({HeadKinds({S, R})}, 4, 8), geometry); }) ==
        "the plan is for layers of 2 KV heads, these have 3");
  CHECK(error_of([&] { Scheduler(LayerPlan({S}, 4, 8), geometry, -1); }).find("rollback must be >= 0") !=
        std::string::npos);
  CHECK(error_of([&] { Scheduler(LayerPlan({S}, 4, 8), geometry, int64_t{1} << 31); }).find("2^31") !=
        std::string::npos);
}

TEST_CASE("kKvFormats: the table agrees with the codecs, and its names are parsed") {
  for (const KvFormat format : kKvFormats) {
    CHECK(parse_kv_format(name(format)) == format);
    dispatch_kv_format(format, [&](auto codec) { CHECK(decltype(codec)::kBits == info(format).bits); });
  }
  CHECK(error_of([] { parse_kv_format("int2"); }) ==
        "KV format \"int2\" is not supported; supported: none, fp8, int8, int4");
}

TEST_CASE("kv_bytes: keys and values of their own size, and no wrapped count") {
  CHECK(kv_bytes({3, 100, 128, 64, 2, {KvFormat::kInt4, KvFormat::kPlain}}, 2) == 2 * 3 * 100 * (64 + 4 + 128));
  CHECK(error_of([] { kv_bytes({3, -1, 128, 64, 2, {}}, 2); }).find("-1 slots") != std::string::npos);
  CHECK(error_of([] { kv_bytes({3, 1, 0, 64, 2, {}}, 2); }).find("got 0, 64 and 2") != std::string::npos);
  CHECK(error_of([] { kv_bytes({1, int64_t{1} << 60, 128, 64, 2, {}}, 2); }).find("2^63") != std::string::npos);
  CHECK(error_of([] { cache_slots(S, 4, 8, -1, 0); }).find("rollback -1") != std::string::npos);
}

TEST_CASE("Scheduler: memory accounting") {
  std::vector<HeadKinds> kinds(32, R);
  std::fill(kinds.begin(), kinds.begin() + 16, S);
  const Scheduler scheduler(LayerPlan(kinds, 128, 256), {32, 8, 128, DType::kBFloat16});
  const int64_t gib = int64_t{1} << 30;
  // Llama-3-8B in bf16: 128 KiB per token over 32 layers.
  CHECK(scheduler.all_retrieval_kv_bytes(1, 131072) == 16 * gib);
  CHECK(scheduler.kv_bytes(1, 131072).retrieval == 8 * gib);
  CHECK(scheduler.kv_bytes(1, 131072).streaming == int64_t{16} * 384 * 4096);
  CHECK(scheduler.kv_bytes(3, 131072).total() == 3 * scheduler.kv_bytes(1, 131072).total());
  CHECK(scheduler.kv_bytes(1, 1 << 22).streaming == scheduler.kv_bytes(1, 1000).streaming);
  CHECK(scheduler.kv_bytes(0, 100).total() == 0);
  const Scheduler in_float32(LayerPlan(kinds, 128, 256), {32, 8, 128, DType::kFloat32});
  CHECK(in_float32.kv_bytes(1, 1000).total() == 2 * scheduler.kv_bytes(1, 1000).total());
  CHECK(error_of([&] { scheduler.kv_bytes(-1, 5); }).find("got batch -1") != std::string::npos);
  CHECK(error_of([&] { scheduler.kv_bytes(1, -5); }).find("max_len -5") != std::string::npos);
  CHECK(error_of([&] { scheduler.kv_bytes(1 << 30, int64_t{1} << 40); }).find("more than 2^63") != std::string::npos);
}

TEST_CASE("Scheduler: refuses a geometry without kernels") {
  const LayerPlan plan({R, S}, 4, 8);
  CHECK(error_of([&] { Scheduler(plan, {32, 8, 100, DType::kFloat16}); }).find("head_dim 100") != std::string::npos);
  CHECK(error_of([&] { Scheduler(plan, {32, 5, 128, DType::kFloat16}); }).find("5 KV heads") != std::string::npos);
  CHECK(error_of([&] { Scheduler(plan, {34, 2, 128, DType::kFloat16}); }).find("at most 16") != std::string::npos);
  CHECK(error_of([&] { Scheduler(plan, {0, 2, 128, DType::kFloat16}); }).find("0 query heads") != std::string::npos);
}

TEST_CASE("Scheduler: params are the caller's tensors with the geometry, sink, window and slots of the cache") {
  const ModelGeometry geometry{6, 2, 80, DType::kFloat16, {KvFormat::kFp8, KvFormat::kPlain}};
  const Scheduler scheduler(LayerPlan({R, S, HeadKinds({S, R})}, 4, 8), geometry);
  const float table = 0;
  float scales = 0;
  LayerTensors tensors{};
  tensors.rotary = {&table, &table, 0, 16, 0, 16, 16, DType::kFloat32};
  tensors.caches[0].capacity = 1000;
  tensors.caches[0].k_scale = &scales;
  const Step step{3, 1, nullptr};
  LayerTensors of_ring = tensors;
  of_ring.caches[0].k_scale = nullptr;
  const AttentionParams full = scheduler.params(0, 0, step, tensors), ring = scheduler.params(1, 0, step, of_ring);
  CHECK(full.window == 0);
  CHECK(full.slots == 1000);
  CHECK(full.k_store.format == KvFormat::kFp8);
  CHECK(ring.sink == 4);
  CHECK(ring.window == 8);
  CHECK(ring.slots == 12);
  for (const AttentionParams& params : {full, ring}) {
    CHECK(params.batch == 3);
    CHECK(params.num_q_heads == 6);
    CHECK(params.num_kv_heads == 2);
    CHECK(params.head_dim == 80);
    CHECK(params.dtype == DType::kFloat16);
    CHECK(params.rotary.cos == &table);
    CHECK(params.rotary.dim == 16);
    CHECK(params.heads.of == nullptr);
    CHECK_NOTHROW(check_params(params));
  }
  const int32_t number = 1;
  tensors.caches[0].heads = &number;
  const AttentionParams head = scheduler.params(2, 0, step, tensors);
  CHECK(head.num_q_heads == 3);
  CHECK(head.num_kv_heads == 1);
  CHECK(head.heads.of == &number);
  CHECK(head.heads.total == 2);
  CHECK_NOTHROW(check_params(head));

  CHECK(error_of([&] { scheduler.params(0, 1, step, tensors); }).find("layer 0 has 1 caches") != std::string::npos);
  CHECK(error_of([&] {
          scheduler.params(0, 0, step, of_ring);
        }).find("retrieval cache holds fp8 codes and needs scales") != std::string::npos);
  CHECK(error_of([&] {
          scheduler.params(1, 0, step, tensors);
        }).find("streaming cache holds elements of the model's dtype and takes no scales") != std::string::npos);
  tensors.caches[0].capacity = -1;
  CHECK(error_of([&] { scheduler.params(0, 0, step, tensors); }).find("capacity must lie in [0, 2^31), got -1") !=
        std::string::npos);
}

TEST_CASE("Scheduler: steps of any size equal attention over the whole history, one call per layer in order") {
  std::mt19937 random(11);
  Model model;
  // Decode before and past the window, a chunk longer than the ring (prefill kernel), and decode again after it.
  for (int q_len : {1, 3, 1, 1, 1, 1, 2, 1, 1, 20, 1, 1, 16, 1, 4}) {
    CAPTURE(q_len);
    CAPTURE(model.seq_lens[0]);
    model.step(random, q_len);
    CHECK(model.visited == std::vector<int>{0, 1, 2});
    for (int l = 0; l < 3; ++l) {
      CAPTURE(l);
      CHECK(model.error(l, q_len) < 1e-4);
    }
    for (int32_t& length : model.seq_lens) length += q_len;
  }
}

TEST_CASE("Scheduler: a step of some cache rows, in any order, is the step of those rows alone") {
  std::mt19937 random(12);
  Model whole, part;
  for (int i = 0; i < 9; ++i) {  // both hold the same: part decodes row 1 of the caches as its batch row 0, and skips 1
    std::mt19937 again = random;
    whole.step(random, 1);
    part.step(again, 1);
    for (Model* model : {&whole, &part}) {
      for (int32_t& length : model->seq_lens) ++length;
    }
  }
  const int32_t rows[] = {1, -1};
  std::mt19937 again = random;
  whole.step(random, 1);
  part.cache_rows = {rows, Model::kBatch};
  part.step(again, 1, {1, 0});
  for (int l = 0; l < 3; ++l) {
    CAPTURE(l);
    const std::vector<float>&all = whole.layers[l].out, &some = part.layers[l].out;
    const std::size_t row = all.size() / Model::kBatch;
    CHECK(std::equal(all.begin() + row, all.end(), some.begin()));
    CHECK(std::all_of(some.begin() + row, some.end(), [](float x) { return x == 0; }));
    CHECK(std::equal(whole.layers[l].k_cache.begin() + whole.layers[l].k_cache.size() / 2,
                     whole.layers[l].k_cache.end(), part.layers[l].k_cache.begin() + part.layers[l].k_cache.size() / 2,
                     [](float a, float b) { return a == b || (std::isnan(a) && std::isnan(b)); }));
  }
}

#if !ZIGZAG_WITH_CUDA
TEST_CASE("CapturedStep: a build without CUDA says so and asks for no tensors") {
  const Scheduler scheduler(LayerPlan({R}, 4, 8), {8, 2, 64, DType::kBFloat16});
  int32_t seq_lens = 0, stream = 0, asked = 0;
  const auto tensors = [&](int) { return ++asked, LayerTensors{}; };
  const Step step{1, 1, &seq_lens};
  CHECK(error_of([&] { CapturedStep(scheduler, step, tensors, 0, &stream); }).find("no CUDA kernels") !=
        std::string::npos);
  CHECK(error_of([&] { CapturedStep(scheduler, step, tensors, -1, &stream); }).find("got -1") != std::string::npos);
  CHECK(asked == 0);
}
#endif
