// Decodes with a plan file and without Python: a plan becomes a scheduler, the scheduler says which caches each layer
// needs, and a step attends all layers and appends the new token to their caches. On the CPU a step is run; on a GPU it
// is captured once and replayed for every token, whatever the length.
//
//   decode_step PLAN.json [cpu|cuda] [TOKENS]
//
// The "model" is its attention alone: queries of the first layer, keys and values are numbers of a generator (a real
// engine's projections), and a layer's output is the next layer's queries.
#include <cctype>
#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "core/error.h"
#include "core/thread_pool.h"
#include "engine/captured_step.h"
#include "engine/plan_file.h"
#include "engine/scheduler.h"
#include "machine.h"

using namespace zigzag;

namespace {

constexpr int kBatch = 2, kHeadDim = 64, kGroup = 4, kMaxLen = 256;
constexpr int kKvHeads = 2;  // where the plan fits any number

// A number in [-1, 1) for element `index` of what a layer is given at a position.
float generate(uint32_t layer, uint32_t tensor, uint32_t position, uint32_t index) {
  uint32_t x = index + 0x9e3779b9u * (position + 0x85ebca6bu * (tensor + 8 * layer + 1));
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return static_cast<float>((x ^ x >> 16) >> 8) / 8388608.0f - 1.0f;
}

std::vector<float> generate_all(int layer, int tensor, int position, int64_t count) {
  std::vector<float> values;
  for (int64_t i = 0; i < count; ++i) {
    values.push_back(generate(static_cast<uint32_t>(layer), static_cast<uint32_t>(tensor),
                              static_cast<uint32_t>(position), static_cast<uint32_t>(i)));
  }
  return values;
}

ModelGeometry geometry_of(const PlanFile& file, DType dtype) {
  const int kv_heads = file.plan.num_kv_heads() > 0 ? file.plan.num_kv_heads() : kKvHeads;
  return {kGroup * kv_heads, kv_heads, kHeadDim, dtype, file.retrieval, file.streaming};
}

class Decoder {
 public:
  Decoder(Machine& machine, const PlanFile& file)
      : machine_(machine), geometry_(geometry_of(file, machine.dtype())), scheduler_(file.plan, geometry_) {
    for (int layer = 0; layer < scheduler_.num_layers(); ++layer) allocate_layer(layer);
    step_ = {kBatch, 1, static_cast<int32_t*>(machine.allocate(kBatch * sizeof(int32_t)))};
    step_.workspace_bytes = attention_workspace_bytes();
    step_.workspace = machine.allocate(step_.workspace_bytes);
  }

  const Scheduler& scheduler() const { return scheduler_; }

  // The last layer's output for the next token, [batch, num_q_heads, head_dim].
  std::vector<float> decode(int position) {
    write(layers_[0].q, generate_all(0, 0, position, q_size()));
    for (int layer = 0; layer < scheduler_.num_layers(); ++layer) {
      write(layers_[static_cast<std::size_t>(layer)].k_new, generate_all(layer, 1, position, kv_size()));
      write(layers_[static_cast<std::size_t>(layer)].v_new, generate_all(layer, 2, position, kv_size()));
    }
    const auto tensors = [this](int layer) { return layers_[static_cast<std::size_t>(layer)]; };
    machine_.run(scheduler_, step_, tensors, position);
    return machine_.read(layers_.back().out, q_size());
  }

 private:
  int64_t q_size() const { return int64_t{kBatch} * geometry_.num_q_heads * kHeadDim; }
  int64_t kv_size() const { return int64_t{kBatch} * geometry_.num_kv_heads * kHeadDim; }
  int64_t bytes(int64_t elements) const { return elements * static_cast<int64_t>(element_size(geometry_.dtype)); }
  void write(const void* to, const std::vector<float>& values) { machine_.write(const_cast<void*>(to), values); }

  void allocate_layer(int layer) {
    LayerTensors t{};
    t.q = layer == 0 ? machine_.allocate(bytes(q_size())) : layers_.back().out;
    t.k_new = machine_.allocate(bytes(kv_size()));
    t.v_new = machine_.allocate(bytes(kv_size()));
    t.out = machine_.allocate(bytes(q_size()));
    t.lse = static_cast<float*>(machine_.allocate(q_size() / kHeadDim * static_cast<int64_t>(sizeof(float))));
    t.q_stride = t.out_stride = {int64_t{geometry_.num_q_heads} * kHeadDim, kHeadDim, kHeadDim};
    t.k_new_stride = t.v_new_stride = {int64_t{geometry_.num_kv_heads} * kHeadDim, kHeadDim, kHeadDim};
    t.scale = 1.0f / std::sqrt(static_cast<float>(kHeadDim));
    const std::vector<CacheSpec>& specs = scheduler_.caches(layer);
    for (std::size_t i = 0; i < specs.size(); ++i) allocate_cache(specs[i], t.caches[i]);
    layers_.push_back(t);
  }

  // Codes are bytes, and their strides count bytes; each vector of them has a scale.
  void allocate_cache(const CacheSpec& spec, CacheTensors& cache) {
    const int64_t slots = spec.slots(kMaxLen), vectors = int64_t{kBatch} * spec.num_kv_heads * slots;
    cache.capacity = slots;
    cache.heads = machine_.heads(spec.heads);
    const auto allocate = [&](KvFormat format, void*& data, Strides& stride, float*& scale, Strides& scale_stride) {
      const int64_t row_bytes = vector_bytes(format, geometry_.dtype, kHeadDim);
      const int64_t row = format == KvFormat::kPlain ? kHeadDim : row_bytes;
      data = machine_.allocate(vectors * row_bytes);
      stride = {spec.num_kv_heads * slots * row, slots * row, row};
      if (format == KvFormat::kPlain) return;
      scale = static_cast<float*>(machine_.allocate(vectors * scale_bytes(format)));
      scale_stride = {spec.num_kv_heads * slots, slots, 1};
    };
    allocate(spec.formats.k, cache.k, cache.k_stride, cache.k_scale, cache.k_scale_stride);
    allocate(spec.formats.v, cache.v, cache.v_stride, cache.v_scale, cache.v_scale_stride);
  }

  Machine& machine_;
  ModelGeometry geometry_;
  Scheduler scheduler_;
  Step step_{};
  std::vector<LayerTensors> layers_;
};

void print_plan(const std::string& path, const Scheduler& scheduler) {
  std::string layers;
  for (int layer = 0; layer < scheduler.num_layers(); ++layer) {
    const std::vector<CacheSpec>& caches = scheduler.caches(layer);
    layers += static_cast<char>(caches.size() > 1 ? 'M' : std::toupper(*name(caches[0].kind)));
  }
  std::printf("%s: layers %s, %d launches a step, %" PRId64 " bytes of caches for %d x %d tokens\n", path.c_str(),
              layers.c_str(), scheduler.launches_per_step(), scheduler.kv_bytes(kBatch, kMaxLen).total(), kBatch,
              kMaxLen);
}

// Prints, per token, the first numbers of the last layer's output in the last row, and returns the outputs.
std::vector<std::vector<float>> decode_all(Decoder& decoder, int tokens, bool print) {
  std::vector<std::vector<float>> outputs;
  for (int position = 0; position < tokens; ++position) {
    outputs.push_back(decoder.decode(position));
    const float* row = outputs.back().data() + outputs.back().size() / kBatch;
    if (print) std::printf("token %d: %.5f %.5f %.5f %.5f\n", position, row[0], row[1], row[2], row[3]);
  }
  return outputs;
}

int run(const std::string& path, const std::string& device, int tokens) {
  ZZ_CHECK(device == "cpu" || device == "cuda", "the device is cpu or cuda, got ", device);
  ZZ_CHECK(tokens >= 1 && tokens <= kMaxLen, "TOKENS must lie in [1, ", kMaxLen, "], got ", tokens);
  const PlanFile file = read_plan_file(path);
  ZZ_CHECK(!file.key_smoothing, path, " asks for key smoothing, which this example does not do");
  CpuMachine cpu;
  Decoder on_cpu(cpu, file);
  print_plan(path, on_cpu.scheduler());
  const std::vector<std::vector<float>> expected = decode_all(on_cpu, tokens, device == "cpu");
  if (device == "cpu") return 0;

  const std::unique_ptr<Machine> gpu = open_gpu();
  Decoder on_gpu(*gpu, file);
  const std::vector<std::vector<float>> outputs = decode_all(on_gpu, tokens, true);
  float worst = 0;
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    for (std::size_t j = 0; j < outputs[i].size(); ++j) {
      const float difference = std::fabs(outputs[i][j] - expected[i][j]);
      worst = difference <= worst ? worst : difference;  // a NaN stays
    }
  }
  std::printf("largest difference from the CPU in float32: %.5f\n", worst);
  return worst < 0.02f ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2 || argc > 4) {
    std::fprintf(stderr, "usage: decode_step PLAN.json [cpu|cuda] [TOKENS]\n");
    return 2;
  }
  try {
    return run(argv[1], argc > 2 ? argv[2] : "cpu", argc > 3 ? std::atoi(argv[3]) : 40);
  } catch (const zigzag::Error& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
}
