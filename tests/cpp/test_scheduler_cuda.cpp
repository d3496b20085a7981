// The scheduler's steps on the GPU against its steps on the CPU, layer by layer, launched and replayed from one
// captured graph: every layer takes the output of the layer before as its queries, so that an order or a launch gone
// wrong shows.
#include <doctest/doctest.h>

#include "engine/scheduler.h"

#if ZIGZAG_WITH_CUDA
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "cuda_testing.h"

namespace zigzag {
namespace {

constexpr int kBatch = 2, kCapacity = 64, kMaxQueries = 20, kLayers = 4;
constexpr DType kDType = DType::kBFloat16;
constexpr LayerKind R = LayerKind::kRetrieval;
constexpr LayerKind S = LayerKind::kStreaming;

using Bits = std::vector<uint16_t>;

template <class T>
void copy_to_device(const DeviceArray<T>& to, const std::vector<T>& from) {
  CHECK_CUDA(cudaMemcpy(to.data(), from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice));
}

// One buffer, on both sides.
struct Twin {
  Bits cpu;
  DeviceArray<uint16_t> gpu;

  explicit Twin(size_t size, float value = 0) : cpu(size, encode(value, kDType)), gpu(cpu) {}

  void* on(bool device) { return device ? gpu.data() : cpu.data(); }
  void fill(std::mt19937& random) {
    std::normal_distribution<float> normal;
    for (uint16_t& bits : cpu) bits = encode(normal(random), kDType);
    copy_to_device(gpu, cpu);
  }
};

struct Layer {
  Twin k_cache, v_cache, k_new, v_new, out;
  std::vector<float> lse;
  DeviceArray<float> lse_gpu;

  Layer(size_t cache, size_t kv, size_t q)
      : k_cache(cache, NAN), v_cache(cache, NAN), k_new(kv), v_new(kv), out(q), lse(q), lse_gpu(lse) {}
};

struct Model {
  ModelGeometry geometry{8, 2, 64, kDType};
  Scheduler scheduler{LayerPlan{{S, R, R, S}, 2, 5}, geometry};
  std::vector<std::unique_ptr<Layer>> layers;
  Twin q{tokens() * geometry.num_q_heads};
  std::vector<int32_t> seq_lens = {0, 7};  // row 1 starts on keys that `fill_past` writes
  DeviceArray<int32_t> seq_lens_gpu{seq_lens};
  DeviceArray<uint8_t> workspace{std::vector<uint8_t>(scheduler.workspace_bytes(kBatch), 0)};

  size_t tokens() const { return size_t{kBatch} * kMaxQueries * geometry.head_dim; }

  explicit Model(std::mt19937& random) {
    for (int l = 0; l < kLayers; ++l) {
      const size_t cache = size_t{kBatch} * geometry.num_kv_heads * slots(l) * geometry.head_dim;
      layers.push_back(
          std::make_unique<Layer>(cache, tokens() * geometry.num_kv_heads, tokens() * geometry.num_q_heads));
      fill_past(*layers[l], l, random);
    }
  }

  int slots(int l) const { return static_cast<int>(scheduler.layer(l).slots(kCapacity)); }

  // The second half of each cache belongs to row 1; 7 tokens fill its ring of 2 + 5 slots and as many of a full cache.
  void fill_past(Layer& layer, int l, std::mt19937& random) {
    std::normal_distribution<float> normal;
    for (Twin* cache : {&layer.k_cache, &layer.v_cache}) {
      const size_t row = cache->cpu.size() / kBatch, head = row / geometry.num_kv_heads;
      for (size_t i = row; i < cache->cpu.size(); ++i) {
        const size_t slot = i % head / geometry.head_dim;
        if (slot < 7) cache->cpu[i] = encode(normal(random), kDType);
      }
      copy_to_device(cache->gpu, cache->cpu);
    }
    REQUIRE(slots(l) >= 7);
  }

  AttentionParams tensors(int l, int q_len, bool device) {
    Layer& layer = *layers[l];
    const auto strides = [&](int heads, int tokens) {
      return Strides{int64_t{heads} * tokens * geometry.head_dim, int64_t{tokens} * geometry.head_dim,
                     geometry.head_dim};
    };
    AttentionParams p{};
    p.q = (l == 0 ? q : layers[l - 1]->out).on(device);
    p.k_new = layer.k_new.on(device);
    p.v_new = layer.v_new.on(device);
    p.k_cache = layer.k_cache.on(device);
    p.v_cache = layer.v_cache.on(device);
    p.out = layer.out.on(device);
    p.lse = device ? layer.lse_gpu.data() : layer.lse.data();
    p.seq_lens = device ? seq_lens_gpu.data() : seq_lens.data();
    p.workspace = device ? workspace.data() : nullptr;
    p.workspace_bytes = device ? scheduler.workspace_bytes(kBatch) : 0;
    p.q_stride = p.out_stride = strides(geometry.num_q_heads, q_len);
    p.k_new_stride = p.v_new_stride = strides(geometry.num_kv_heads, q_len);
    p.k_cache_stride = p.v_cache_stride = strides(geometry.num_kv_heads, slots(l));
    p.batch = kBatch;
    p.q_len = q_len;
    p.slots = kCapacity;
    p.scale = 0.2f;
    return p;
  }

  void next_inputs(std::mt19937& random) {
    q.fill(random);
    for (auto& layer : layers) {
      layer->k_new.fill(random);
      layer->v_new.fill(random);
    }
    copy_to_device(seq_lens_gpu, seq_lens);
  }

  void step_cpu(int q_len) {
    scheduler.step_cpu([&](int l) { return tensors(l, q_len, false); }, ParallelFor{});
  }
  void step_cuda(int q_len, cudaStream_t stream) {
    scheduler.step_cuda([&](int l) { return tensors(l, q_len, true); }, stream);
  }

  // bf16 outputs round once per layer on either side, and a layer's queries carry the roundings of the layers before.
  void check_same(int q_len) {
    for (int l = 0; l < kLayers; ++l) {
      CAPTURE(l);
      const Bits out = layers[l]->out.gpu.host();
      const size_t used = out.size() / kMaxQueries * q_len;
      double worst = 0;
      for (size_t i = 0; i < used; ++i) {
        const double difference =
            std::abs(zigzag::decode(out[i], kDType) - zigzag::decode(layers[l]->out.cpu[i], kDType));
        worst = std::isnan(difference) ? INFINITY : std::fmax(worst, difference);
      }
      CHECK(worst < 0.03);
      CHECK(layers[l]->k_cache.gpu.host() == layers[l]->k_cache.cpu);
      CHECK(layers[l]->v_cache.gpu.host() == layers[l]->v_cache.cpu);
    }
  }

  void advance(int q_len) {
    for (int32_t& length : seq_lens) length += q_len;
  }
};

}  // namespace

TEST_CASE("Scheduler on the GPU: steps of any size equal those on the CPU") {
  if (no_device()) return;
  std::mt19937 random(5);
  Model model(random);
  for (const int q_len : {1, 3, 1, 1, 2, 20, 1, 16, 1}) {
    CAPTURE(q_len);
    model.next_inputs(random);
    model.step_cuda(q_len, nullptr);
    CHECK_CUDA(cudaDeviceSynchronize());
    model.step_cpu(q_len);
    model.check_same(q_len);
    model.advance(q_len);
  }
}

TEST_CASE("Scheduler on the GPU: one captured step serves every length, with one kernel per layer") {
  if (no_device()) return;
  std::mt19937 random(6);
  Model model(random);
  cudaStream_t stream;
  CHECK_CUDA(cudaStreamCreate(&stream));
  cudaGraph_t graph;
  CHECK_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  model.step_cuda(1, stream);
  CHECK_CUDA(cudaStreamEndCapture(stream, &graph));
  size_t nodes = 0;
  CHECK_CUDA(cudaGraphGetNodes(graph, nullptr, &nodes));
  CHECK(nodes == static_cast<size_t>(model.scheduler.launches_per_step()));
  cudaGraphExec_t step;
  CHECK_CUDA(cudaGraphInstantiate(&step, graph, 0));
  for (int i = 0; i < 40; ++i) {
    CAPTURE(i);
    model.next_inputs(random);
    CHECK_CUDA(cudaGraphLaunch(step, stream));
    CHECK_CUDA(cudaStreamSynchronize(stream));
    model.step_cpu(1);
    model.check_same(1);
    model.advance(1);
  }
  CHECK_CUDA(cudaGraphExecDestroy(step));
  CHECK_CUDA(cudaGraphDestroy(graph));
  CHECK_CUDA(cudaStreamDestroy(stream));
}

}  // namespace zigzag
#endif
