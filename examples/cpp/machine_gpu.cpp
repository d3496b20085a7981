#include "core/error.h"
#include "machine.h"

#if ZIGZAG_WITH_CUDA
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <optional>

namespace {

void check(cudaError_t status) { ZZ_CHECK(status == cudaSuccess, "CUDA: ", cudaGetErrorString(status)); }

class GpuMachine final : public Machine {
 public:
  GpuMachine() { check(cudaStreamCreate(&stream_)); }
  ~GpuMachine() override {
    cudaStreamSynchronize(stream_);
    step_.reset();
    for (void* data : memory_) cudaFree(data);
    cudaStreamDestroy(stream_);
  }
  GpuMachine(const GpuMachine&) = delete;
  GpuMachine& operator=(const GpuMachine&) = delete;

  zigzag::DType dtype() const override { return zigzag::DType::kFloat16; }

  void* allocate(int64_t bytes) override {
    void* data = nullptr;
    check(cudaMalloc(&data, static_cast<std::size_t>(bytes)));
    memory_.push_back(data);
    check(cudaMemset(data, 0, static_cast<std::size_t>(bytes)));
    return data;
  }
  void write(void* to, const std::vector<float>& values) override {
    const std::vector<__half> halves(values.begin(), values.end());
    copy(to, halves.data(), halves.size() * sizeof(__half), cudaMemcpyHostToDevice);
  }
  std::vector<float> read(const void* from, int64_t count) override {
    std::vector<__half> halves(static_cast<std::size_t>(count));
    copy(halves.data(), from, halves.size() * sizeof(__half), cudaMemcpyDeviceToHost);
    return {halves.begin(), halves.end()};
  }
  const int32_t* heads(const std::vector<int32_t>& numbers) override {
    if (numbers.empty()) return nullptr;
    void* data = allocate(static_cast<int64_t>(numbers.size() * sizeof(int32_t)));
    copy(data, numbers.data(), numbers.size() * sizeof(int32_t), cudaMemcpyHostToDevice);
    return static_cast<const int32_t*>(data);
  }

  // Captured at the first token, replayed for this and every later one.
  void run(const zigzag::Scheduler& scheduler, const zigzag::Step& step, const zigzag::Scheduler::LayerCall& tensors,
           int64_t held) override {
    if (!step_) step_.emplace(scheduler, step, tensors, held, stream_);
    step_->replay(stream_);
  }

 private:
  // Waits for what was queued before, and for the copy.
  void copy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind) {
    check(cudaMemcpyAsync(to, from, bytes, kind, stream_));
    check(cudaStreamSynchronize(stream_));
  }

  cudaStream_t stream_ = nullptr;
  std::vector<void*> memory_;
  std::optional<zigzag::CapturedStep> step_;
};

}  // namespace

std::unique_ptr<Machine> open_gpu() { return std::make_unique<GpuMachine>(); }
#else
std::unique_ptr<Machine> open_gpu() {
  throw zigzag::Error("this example was built without CUDA; build zigzag_ext with nvcc on the PATH");
}
#endif
