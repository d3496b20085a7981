// A captured step of a plan with mixed layers and quantised caches, replayed over wrapping rings, against the same step
// on the CPU.
#include <doctest/doctest.h>

#include "engine/captured_step.h"

#if ZIGZAG_WITH_CUDA
#include <cmath>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda_testing.h"

namespace zigzag {
namespace {

constexpr int kBatch = 2, kHeadDim = 64, kCapacity = 48, kSteps = 40;
constexpr DType kDType = DType::kBFloat16;
constexpr LayerKind R = LayerKind::kRetrieval;
constexpr LayerKind S = LayerKind::kStreaming;

// The buffers of all layers on one side, made in one order on both.
class Side {
 public:
  Side(const Scheduler& scheduler, bool device) : scheduler_(scheduler), device_(device) {
    const ModelGeometry& g = scheduler.geometry();
    const Strides q{int64_t{g.num_q_heads} * kHeadDim, kHeadDim, kHeadDim};
    const Strides kv{int64_t{g.num_kv_heads} * kHeadDim, kHeadDim, kHeadDim};
    for (int layer = 0; layer < scheduler.num_layers(); ++layer) {
      LayerTensors t{};
      t.q = layer == 0 ? allocate(q_bytes()) : layers.back().out;
      t.k_new = allocate(kv_bytes()), t.v_new = allocate(kv_bytes()), t.out = allocate(q_bytes());
      t.lse = static_cast<float*>(allocate(q_bytes()));
      t.q_stride = t.out_stride = q, t.k_new_stride = t.v_new_stride = kv;
      t.scale = 0.125f;
      const std::vector<CacheSpec>& specs = scheduler.caches(layer);
      for (std::size_t i = 0; i < specs.size(); ++i) add_cache(specs[i], t.caches[i]);
      layers.push_back(t);
    }
    step = {kBatch, 1, static_cast<int32_t*>(allocate(kBatch * sizeof(int32_t)))};
    step.workspace_bytes = attention_workspace_bytes();
    step.workspace = allocate(static_cast<std::size_t>(step.workspace_bytes));
  }

  std::size_t q_bytes() const { return std::size_t{kBatch} * scheduler_.geometry().num_q_heads * kHeadDim * 2; }
  std::size_t kv_bytes() const { return std::size_t{kBatch} * scheduler_.geometry().num_kv_heads * kHeadDim * 2; }

  void write(const void* to, const std::vector<uint16_t>& bits) const {
    CHECK_CUDA(cudaMemcpy(const_cast<void*>(to), bits.data(), bits.size() * 2, cudaMemcpyDefault));
  }
  std::vector<uint16_t> read(const void* from, std::size_t bytes) const {
    std::vector<uint16_t> bits(bytes / 2);
    CHECK_CUDA(cudaMemcpy(bits.data(), from, bytes, cudaMemcpyDefault));
    return bits;
  }

  Scheduler::LayerCall tensors() const {
    return [this](int layer) { return layers[static_cast<std::size_t>(layer)]; };
  }

  std::vector<LayerTensors> layers;
  Step step{};

 private:
  void* allocate(std::size_t bytes) {
    if (device_) {
      gpu_.push_back(std::make_unique<DeviceArray<char>>(std::vector<char>(bytes, 0)));
      return gpu_.back()->data();
    }
    cpu_.push_back(std::make_unique<char[]>(bytes));
    return cpu_.back().get();
  }

  void add_cache(const CacheSpec& spec, CacheTensors& cache) {
    const int64_t slots = spec.slots(kCapacity), heads = spec.num_kv_heads, vectors = kBatch * heads * slots;
    cache.capacity = slots;
    if (device_ && !spec.heads.empty()) {
      heads_.push_back(std::make_unique<DeviceArray<int32_t>>(spec.heads));
      cache.heads = heads_.back()->data();
    }
    const auto add = [&](KvFormat format, void*& data, Strides& stride, float*& scale, Strides& scale_stride) {
      const int64_t bytes = vector_bytes(format, kDType, kHeadDim), row = format == KvFormat::kPlain ? kHeadDim : bytes;
      data = allocate(static_cast<std::size_t>(vectors * bytes));
      stride = {heads * slots * row, slots * row, row};
      if (format == KvFormat::kPlain) return;
      scale = static_cast<float*>(allocate(static_cast<std::size_t>(vectors) * sizeof(float)));
      scale_stride = {heads * slots, slots, 1};
    };
    add(spec.formats.k, cache.k, cache.k_stride, cache.k_scale, cache.k_scale_stride);
    add(spec.formats.v, cache.v, cache.v_stride, cache.v_scale, cache.v_scale_stride);
  }

  const Scheduler& scheduler_;
  bool device_;
  std::vector<std::unique_ptr<DeviceArray<char>>> gpu_;
  std::vector<std::unique_ptr<DeviceArray<int32_t>>> heads_;
  std::vector<std::unique_ptr<char[]>> cpu_;
};

std::vector<uint16_t> random_bits(std::mt19937& random, std::size_t bytes) {
  std::normal_distribution<float> normal;
  std::vector<uint16_t> bits(bytes / 2);
  for (uint16_t& value : bits) value = encode(normal(random), kDType);
  return bits;
}

}  // namespace

TEST_CASE("CapturedStep: mixed layers and quantised caches, one launch per cache") {
  if (no_device()) return;
  const LayerPlan plan({S, HeadKinds({S, R, S}), R}, 2, 5);
  struct Formats {
    KvFormats retrieval, streaming;
  };
  const Formats all[] = {{{}, {}},
                         {{KvFormat::kInt8, KvFormat::kInt4}, {KvFormat::kFp8, KvFormat::kFp8}},
                         {{KvFormat::kInt8, KvFormat::kInt8}, {}}};
  for (const Formats& formats : all) {
    CAPTURE(name(formats.retrieval.k));
    const Scheduler scheduler(plan, {12, 3, kHeadDim, kDType, formats.retrieval, formats.streaming});
    Side cpu(scheduler, false), gpu(scheduler, true);
    cudaStream_t stream;
    CHECK_CUDA(cudaStreamCreate(&stream));
    {
      CapturedStep step(scheduler, gpu.step, gpu.tensors(), 0, stream);
      CHECK(step.num_nodes() == scheduler.launches_per_step() + 1);
      CHECK(step.capacity() == kCapacity);
      std::mt19937 random(3);
      for (int i = 0; i < kSteps; ++i) {
        CAPTURE(i);
        for (int layer = 0; layer < scheduler.num_layers(); ++layer) {
          const std::size_t l = static_cast<std::size_t>(layer);
          const std::vector<uint16_t> k = random_bits(random, cpu.kv_bytes()), v = random_bits(random, cpu.kv_bytes());
          const std::vector<uint16_t> q = random_bits(random, cpu.q_bytes());
          for (Side* side : {&cpu, &gpu}) {
            side->write(side->layers[l].k_new, k);
            side->write(side->layers[l].v_new, v);
            if (layer == 0) side->write(side->layers[l].q, q);
          }
        }
        step.replay(stream);
        CHECK_CUDA(cudaStreamSynchronize(stream));
        scheduler.step_cpu(cpu.step, cpu.tensors(), ParallelFor{});
        for (int b = 0; b < kBatch; ++b) ++cpu.step.seq_lens[b];
        double worst = 0;
        for (std::size_t l = 0; l < cpu.layers.size(); ++l) {
          const std::vector<uint16_t> a = cpu.read(cpu.layers[l].out, cpu.q_bytes());
          const std::vector<uint16_t> b = gpu.read(gpu.layers[l].out, gpu.q_bytes());
          for (std::size_t j = 0; j < a.size(); ++j) {
            const double difference = std::abs(zigzag::decode(a[j], kDType) - zigzag::decode(b[j], kDType));
            worst = std::isnan(difference) ? INFINITY : std::fmax(worst, difference);
          }
        }
        CHECK(worst < 0.06);
      }
    }
    CHECK_CUDA(cudaStreamDestroy(stream));
  }
}

TEST_CASE("CapturedStep: a mixed layer without its heads on the device is refused") {
  if (no_device()) return;
  const Scheduler scheduler(LayerPlan({HeadKinds({S, R, S})}, 2, 5), {12, 3, kHeadDim, kDType});
  Side gpu(scheduler, true);
  gpu.layers[0].caches[1].heads = nullptr;
  cudaStream_t stream;
  CHECK_CUDA(cudaStreamCreate(&stream));
  std::string message = "no error";
  try {
    CapturedStep(scheduler, gpu.step, gpu.tensors(), 0, stream);
  } catch (const Error& error) {
    message = error.what();
  }
  CHECK(message.find("layer 0 is mixed: on CUDA each of its caches needs `heads`") != std::string::npos);
  CHECK_CUDA(cudaStreamDestroy(stream));
}

}  // namespace zigzag
#endif
