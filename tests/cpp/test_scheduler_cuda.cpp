// The scheduler's steps on the GPU against its steps on the CPU, layer by layer, launched and replayed from one
// captured graph: every layer takes the output of the layer before as its queries, so that an order or a launch gone
// wrong shows.
#include <doctest/doctest.h>

#include "engine/captured_step.h"
#include "engine/scheduler.h"

#if ZIGZAG_WITH_CUDA
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda_testing.h"
#include "error_text.h"

namespace zigzag {
namespace {

constexpr int kBatch = 2, kCapacity = 64, kMaxQueries = 20, kLayers = 4;
constexpr DType kDType = DType::kBFloat16;
constexpr LayerKind R = LayerKind::kRetrieval;
constexpr LayerKind S = LayerKind::kStreaming;

using testing::error_of;
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
  DeviceArray<uint8_t> workspace{std::vector<uint8_t>(attention_workspace_bytes(), 0)};

  size_t tokens() const { return size_t{kBatch} * kMaxQueries * geometry.head_dim; }

  explicit Model(std::mt19937& random) {
    for (int l = 0; l < kLayers; ++l) {
      const size_t cache = size_t{kBatch} * geometry.num_kv_heads * slots(l) * geometry.head_dim;
      layers.push_back(
          std::make_unique<Layer>(cache, tokens() * geometry.num_kv_heads, tokens() * geometry.num_q_heads));
      fill_past(*layers[l], l, random);
    }
  }

  int slots(int l) const { return static_cast<int>(scheduler.caches(l)[0].slots(kCapacity)); }

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

  Step step(int q_len, bool device) {
    Step s{kBatch, q_len, device ? seq_lens_gpu.data() : seq_lens.data()};
    if (device) s.workspace = workspace.data(), s.workspace_bytes = attention_workspace_bytes();
    return s;
  }

  LayerTensors tensors(int l, int q_len, bool device) {
    Layer& layer = *layers[l];
    const auto strides = [&](int heads, int tokens) {
      return Strides{int64_t{heads} * tokens * geometry.head_dim, int64_t{tokens} * geometry.head_dim,
                     geometry.head_dim};
    };
    const Strides q_stride = strides(geometry.num_q_heads, q_len), new_stride = strides(geometry.num_kv_heads, q_len);
    LayerTensors t{(l == 0 ? q : layers[l - 1]->out).on(device),
                   layer.k_new.on(device),
                   layer.v_new.on(device),
                   layer.out.on(device),
                   device ? layer.lse_gpu.data() : layer.lse.data(),
                   q_stride,
                   new_stride,
                   new_stride,
                   q_stride,
                   0.2f};
    CacheTensors& cache = t.caches[0];
    cache.k = layer.k_cache.on(device);
    cache.v = layer.v_cache.on(device);
    cache.k_stride = cache.v_stride = strides(geometry.num_kv_heads, slots(l));
    cache.capacity = kCapacity;
    return t;
  }

  void fill_inputs(std::mt19937& random) {
    q.fill(random);
    for (auto& layer : layers) {
      layer->k_new.fill(random);
      layer->v_new.fill(random);
    }
  }
  void next_inputs(std::mt19937& random) {
    fill_inputs(random);
    copy_to_device(seq_lens_gpu, seq_lens);
  }

  void step_cpu(int q_len) {
    scheduler.step_cpu(step(q_len, false), [&](int l) { return tensors(l, q_len, false); }, ParallelFor{});
  }
  void step_cuda(int q_len, cudaStream_t stream) {
    scheduler.step_cuda(step(q_len, true), [&](int l) { return tensors(l, q_len, true); }, stream);
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

  CapturedStep capture(int q_len, cudaStream_t stream) {
    return CapturedStep(
        scheduler, step(q_len, true), [=](int l) { return tensors(l, q_len, true); }, longest(), stream);
  }
  int32_t longest() const { return *std::max_element(seq_lens.begin(), seq_lens.end()); }

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

namespace {

// A stream for the length of a test.
struct TestStream {
  cudaStream_t handle = nullptr;
  TestStream() { CHECK_CUDA(cudaStreamCreate(&handle)); }
  ~TestStream() { cudaStreamDestroy(handle); }
  void wait() const { CHECK_CUDA(cudaStreamSynchronize(handle)); }
};

}  // namespace

TEST_CASE("CapturedStep: replays advance the lengths on the device, up to the capacity and no further") {
  if (no_device()) return;
  for (const int q_len : {1, 3}) {
    CAPTURE(q_len);
    std::mt19937 random(7);
    Model model(random);
    const TestStream stream;
    CapturedStep step = model.capture(q_len, stream.handle);
    CHECK(step.num_nodes() == model.scheduler.launches_per_step() + 1);
    CHECK(step.capacity() == kCapacity);
    CHECK(model.seq_lens_gpu.host() == std::vector<int32_t>{0, 7});  // capturing runs nothing
    while (model.longest() + q_len <= kCapacity) {
      CAPTURE(model.longest());
      model.fill_inputs(random);
      step.replay(stream.handle);
      stream.wait();
      model.step_cpu(q_len);
      model.check_same(q_len);
      model.advance(q_len);
      CHECK(model.seq_lens_gpu.host() == model.seq_lens);
      CHECK(step.longest() == model.longest());
    }
    CHECK(step.longest() > kCapacity - q_len);
    const std::string full = error_of([&] { step.replay(stream.handle); });
    CHECK(full.find("they hold 64 tokens a row, the longest row has 6") != std::string::npos);
    stream.wait();
    CHECK(model.seq_lens_gpu.host() == model.seq_lens);
    model.check_same(q_len);
    copy_to_device(model.seq_lens_gpu, std::vector<int32_t>{0, 0});  // as after a reset
    step.set_longest(0);
    CHECK(error_of([&] { step.replay(stream.handle); }) == "no error");
    stream.wait();
    CHECK(model.seq_lens_gpu.host() == std::vector<int32_t>{q_len, q_len});
  }
}

TEST_CASE("CapturedStep: padded columns do not count, and what the caller enqueues is part of the step") {
  if (no_device()) return;
  std::mt19937 random(8);
  Model model(random);
  const TestStream stream;
  const DeviceArray<int32_t> pad({2, -1});  // cut to [0, q_len]
  const DeviceArray<uint8_t> marks(std::vector<uint8_t>(kLayers + 1, 0));
  const auto tensors = [&](int l) {
    CHECK_CUDA(cudaMemsetAsync(marks.data() + l, l + 1, 1, stream.handle));
    return model.tensors(l, 3, true);
  };
  const auto after = [&] { CHECK_CUDA(cudaMemsetAsync(marks.data() + kLayers, 9, 1, stream.handle)); };
  Step shape = model.step(3, true);
  shape.pad = pad.data();
  CapturedStep step(model.scheduler, shape, tensors, 7, stream.handle, after);
  CHECK(step.num_nodes() == 2 * kLayers + 2);
  step.replay(stream.handle);
  step.replay(stream.handle);
  stream.wait();
  CHECK(model.seq_lens_gpu.host() == std::vector<int32_t>{2, 13});
  CHECK(marks.host() == std::vector<uint8_t>{1, 2, 3, 4, 9});
  CHECK(step.longest() == 13);
}

TEST_CASE("CapturedStep: lengths are those of cache rows, and a row that is skipped stays as it is") {
  if (no_device()) return;
  std::mt19937 random(10);
  Model model(random);
  const TestStream stream;
  const DeviceArray<int32_t> rows({1, -1});
  Step shape = model.step(1, true);
  shape.cache_rows = {rows.data(), kBatch};
  CapturedStep step(model.scheduler, shape, [&](int l) { return model.tensors(l, 1, true); }, 7, stream.handle);
  step.replay(stream.handle);
  step.replay(stream.handle);
  stream.wait();
  CHECK(model.seq_lens_gpu.host() == std::vector<int32_t>{0, 9});
  copy_to_device(rows, {-1, 0});  // read at every replay
  step.replay(stream.handle);
  stream.wait();
  CHECK(model.seq_lens_gpu.host() == std::vector<int32_t>{1, 9});
}

TEST_CASE("CapturedStep: what it cannot capture leaves the stream usable") {
  if (no_device()) return;
  std::mt19937 random(9);
  Model model(random);
  const TestStream stream;
  const auto capture = [&](const Scheduler::LayerCall& tensors) {
    return error_of([&] { CapturedStep(model.scheduler, model.step(1, true), tensors, 7, stream.handle); });
  };
  CHECK(capture([&](int l) {
          LayerTensors t = model.tensors(l, 1, true);
          if (l == 2) t.caches[0].k_scale = t.lse;
          return t;
        }).find("layer 2: the retrieval cache") != std::string::npos);
  CHECK(capture([&](int) -> LayerTensors { throw Error("no tensors today"); }) == "no tensors today");
  CHECK(error_of([&] { model.capture(1, nullptr); }).find("default stream") != std::string::npos);
  CHECK(error_of([&] { model.capture(0, stream.handle); }).find("got batch 2 and q_len 0") != std::string::npos);

  CapturedStep step = model.capture(1, stream.handle);
  step.replay(stream.handle);
  stream.wait();
  CHECK(model.seq_lens_gpu.host() == std::vector<int32_t>{1, 8});
}

}  // namespace zigzag
#endif
