// What a benchmark needs from the machine that runs the kernels. Two implementations: device_cpu.cpp, device_cuda.cu.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "engine/scheduler.h"

namespace zigzag::bench {

struct Quantiles {
  double p20, p50, p80;
};

// Quantiles of a non-empty sample, linearly interpolated.
Quantiles quantiles(std::vector<double> sample);

class Device {
 public:
  virtual ~Device() = default;

  virtual std::string name() const = 0;    // the GPU, or the CPU model and the number of threads
  virtual std::string driver() const = 0;  // "-" on a CPU

  virtual std::shared_ptr<void> allocate(int64_t bytes) = 0;  // zeroed
  virtual void upload(void* to, const void* from, int64_t bytes) = 0;
  virtual void download(void* to, const void* from, int64_t bytes) = 0;  // after all queued work
  // Fills with normal deviates of standard deviation `sigma` (random.h).
  virtual void fill_normal(void* data, int64_t count, DType dtype, float sigma, uint64_t seed) = 0;

  // What is timed. On CUDA it is enqueued, never waited for.
  virtual void attention(const AttentionParams& params) = 0;
  // A whole step, `after` behind its last layer, ready to run any number of times: on CUDA a CapturedStep, whose length
  // on the device each run advances. `longest` counts the tokens of the longest row at every start.
  virtual std::function<void()> prepare(const Scheduler& scheduler, const Step& step,
                                        const Scheduler::LayerCall& tensors, const std::function<void()>& after,
                                        int64_t longest) = 0;
  // out[rows, out_features] = in[rows, in_features] x weight[out_features, in_features] transposed, all of `dtype`.
  // By cuBLAS, which is looked for when first called; throws where there is none, and on the CPU.
  struct Linear {
    const void *weight, *in;
    void* out;
    int rows, in_features, out_features;
    DType dtype;
  };
  virtual void linear(const Linear& linear) = 0;
  virtual void read(const void* a, const void* b, int64_t bytes_each) = 0;  // reads both, keeps nothing
  virtual void copy(void* to, const void* from, int64_t bytes) = 0;

  // Microseconds per call: one list of samples for each of `calls`, which take turns, so that a drifting machine
  // touches all alike and sample i of one call was taken beside sample i of the others. A call works on one set of
  // buffers; all calls share one rotation through the sets, so that none finds in a cache what its predecessor read. On
  // CUDA up to `calls_per_reading` calls run as one graph between two clock readings. A call with `before` is a graph
  // of its own, or none: it runs alone, behind `before`, which no clock sees.
  struct Call {
    std::function<void(int set)> run, before = nullptr;
  };
  virtual std::vector<std::vector<double>> sample(const std::vector<Call>& calls, int num_sets,
                                                  int calls_per_reading) = 0;

  // Quantiles of `sample`, for calls that move `bytes_per_call` each: as many calls between two clock readings as take
  // about a millisecond.
  std::vector<Quantiles> time(const std::vector<Call>& calls, int num_sets, int64_t bytes_per_call);
};

// `kind` is "cpu" or "cuda"; `threads` counts CPU threads, 0 means all cores. Throws on any other kind, and on "cuda"
// in a build without CUDA.
std::unique_ptr<Device> open_device(const std::string& kind, int threads);

std::unique_ptr<Device> open_cpu(int threads);
std::unique_ptr<Device> open_cuda();

// Bytes that the rotated buffers of one cell span, of which a clock may leave out up to 4%: eight times the L2 of an
// H100, and past any last-level cache that the CPU benchmarks have met.
inline constexpr int64_t kColdBytes = 420'000'000;

}  // namespace zigzag::bench
