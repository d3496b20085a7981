// A GPU as a benchmark device: every measurement replays a captured graph between two events.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <fstream>
#include <sstream>

#include "cublas.h"
#include "cuda/launch.h"
#include "device.h"
#include "engine/captured_step.h"
#include "kernels/attention.h"
#include "random.h"

namespace zigzag::bench {
namespace {

constexpr int kReplays = 20;
constexpr long long kHoldCycles = 400'000;  // about 0.2 ms: longer than the host needs to enqueue a replay
constexpr int kBlock = 256;
constexpr int kLoadsInFlight = 8;  // 16-byte loads per thread

template <class T>
__device__ T from_float(float value);
template <>
__device__ __nv_bfloat16 from_float(float value) {
  return __float2bfloat16(value);
}
template <>
__device__ __half from_float(float value) {
  return __float2half(value);
}

template <class T>
__global__ void fill_kernel(T* data, int64_t count, float sigma, uint64_t seed) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
    data[i] = from_float<T>(sigma * random_normal(seed, static_cast<uint64_t>(i)));
  }
}

__global__ void hold_kernel(long long cycles) {
  const long long start = clock64();
  while (clock64() - start < cycles) {
  }
}

// grid.y picks the array. Each block streams tiles of kBlock * kLoadsInFlight vectors; the store never happens but
// keeps the loads alive.
__global__ void __launch_bounds__(kBlock) read_kernel(const uint4* a, const uint4* b, int64_t count, uint32_t* never) {
  const uint4* data = blockIdx.y == 0 ? a : b;
  uint32_t sum = 0;
  constexpr int64_t kTile = static_cast<int64_t>(kBlock) * kLoadsInFlight;
  for (int64_t base = blockIdx.x * kTile; base < count; base += gridDim.x * kTile) {
    uint4 value[kLoadsInFlight];
#pragma unroll
    for (int i = 0; i < kLoadsInFlight; ++i) {
      const int64_t at = base + i * kBlock + threadIdx.x;
      value[i] = at < count ? __ldcs(data + at) : uint4{};
    }
#pragma unroll
    for (int i = 0; i < kLoadsInFlight; ++i) sum ^= value[i].x ^ value[i].y ^ value[i].z ^ value[i].w;
  }
  if (sum == 0x9E3779B9u) *never = sum;
}

// A copy by the multiprocessors: in a graph, cudaMemcpyAsync goes to a copy engine, which reaches 2.4 of 3.0 TB/s on an
// H100.
__global__ void __launch_bounds__(kBlock) copy_kernel(uint4* to, const uint4* from, int64_t count) {
  constexpr int64_t kTile = static_cast<int64_t>(kBlock) * kLoadsInFlight;
  for (int64_t base = blockIdx.x * kTile; base < count; base += gridDim.x * kTile) {
    uint4 value[kLoadsInFlight];
#pragma unroll
    for (int i = 0; i < kLoadsInFlight; ++i) {
      const int64_t at = base + i * kBlock + threadIdx.x;
      if (at < count) value[i] = __ldcs(from + at);
    }
#pragma unroll
    for (int i = 0; i < kLoadsInFlight; ++i) {
      const int64_t at = base + i * kBlock + threadIdx.x;
      if (at < count) __stcs(to + at, value[i]);
    }
  }
}

struct Stream {
  cudaStream_t handle = nullptr;
  Stream() { ZZ_CUDA(cudaStreamCreateWithFlags(&handle, cudaStreamNonBlocking)); }
  ~Stream() { cudaStreamDestroy(handle); }
};

struct Event {
  cudaEvent_t handle = nullptr;
  Event() { ZZ_CUDA(cudaEventCreate(&handle)); }
  ~Event() { cudaEventDestroy(handle); }
};

class Graph {
 public:
  Graph(cudaStream_t stream, const std::function<void()>& body) {
    cudaGraph_t graph = nullptr;
    ZZ_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    body();
    ZZ_CUDA(cudaStreamEndCapture(stream, &graph));
    const cudaError_t status = cudaGraphInstantiate(&executable_, graph, 0);
    cudaGraphDestroy(graph);
    ZZ_CUDA(status);
    ZZ_CUDA(cudaGraphUpload(executable_, stream));
  }
  ~Graph() { cudaGraphExecDestroy(executable_); }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  void launch(cudaStream_t stream) const { ZZ_CUDA(cudaGraphLaunch(executable_, stream)); }

 private:
  cudaGraphExec_t executable_ = nullptr;
};

class Gpu final : public Device {
 public:
  Gpu() {
    int device = 0;
    ZZ_CUDA(cudaGetDevice(&device));
    ZZ_CUDA(cudaGetDeviceProperties(&properties_, device));
    never_ = allocate(sizeof(uint32_t));
  }

  std::string name() const override { return properties_.name; }

  // The kernel module's version where Linux shows it, else the newest CUDA that the driver serves.
  std::string driver() const override {
    std::ifstream file("/proc/driver/nvidia/version");
    for (std::string word; file >> word;) {
      if (std::count(word.begin(), word.end(), '.') >= 1 && word.find_first_not_of("0123456789.") == std::string::npos)
        return word;
    }
    int version = 0;
    ZZ_CUDA(cudaDriverGetVersion(&version));
    return concat("cuda ", version / 1000, ".", version % 1000 / 10);
  }

  std::shared_ptr<void> allocate(int64_t bytes) override {
    void* data = nullptr;
    ZZ_CUDA(cudaMalloc(&data, static_cast<std::size_t>(std::max<int64_t>(bytes, 16))));
    std::shared_ptr<void> owner(data, cudaFree);
    ZZ_CUDA(cudaMemsetAsync(data, 0, static_cast<std::size_t>(bytes), stream_.handle));
    return owner;
  }

  void upload(void* to, const void* from, int64_t bytes) override {
    ZZ_CUDA(cudaMemcpyAsync(to, from, static_cast<std::size_t>(bytes), cudaMemcpyHostToDevice, stream_.handle));
    synchronize();
  }

  void download(void* to, const void* from, int64_t bytes) override {
    ZZ_CUDA(cudaMemcpyAsync(to, from, static_cast<std::size_t>(bytes), cudaMemcpyDeviceToHost, stream_.handle));
    synchronize();
  }

  void fill_normal(void* data, int64_t count, DType dtype, float sigma, uint64_t seed) override {
    ZZ_CHECK(dtype != DType::kFloat32, "--dtype fp32 runs on the CPU only; on CUDA: bf16, fp16");
    const int blocks = properties_.multiProcessorCount * 8;
    if (dtype == DType::kBFloat16) {
      fill_kernel<<<blocks, kBlock, 0, stream_.handle>>>(static_cast<__nv_bfloat16*>(data), count, sigma, seed);
    } else {
      fill_kernel<<<blocks, kBlock, 0, stream_.handle>>>(static_cast<__half*>(data), count, sigma, seed);
    }
    ZZ_CUDA(cudaGetLastError());
  }

  void attention(const AttentionParams& params) override { attention_cuda(params, stream_.handle); }
  std::function<void()> prepare(const Scheduler& scheduler, const Step& step, const Scheduler::LayerCall& tensors,
                                const std::function<void()>& after, int64_t longest) override {
    const auto captured = std::make_shared<CapturedStep>(scheduler, step, tensors, longest, stream_.handle, after);
    return [this, captured, longest] {
      captured->set_longest(longest);
      captured->replay(stream_.handle);
    };
  }
  void linear(const Linear& linear) override {
    if (!cublas_) cublas_ = std::make_unique<Cublas>(*this, stream_.handle);
    cublas_->linear(linear);
  }

  void read(const void* a, const void* b, int64_t bytes_each) override {
    const int64_t count = bytes_each / 16, tile = kBlock * kLoadsInFlight;
    const int64_t resident = properties_.multiProcessorCount * (properties_.maxThreadsPerMultiProcessor / kBlock) / 2;
    const int blocks = static_cast<int>(std::max<int64_t>(1, std::min((count + tile - 1) / tile, resident)));
    read_kernel<<<dim3(blocks, 2), kBlock, 0, stream_.handle>>>(
        static_cast<const uint4*>(a), static_cast<const uint4*>(b), count, static_cast<uint32_t*>(never_.get()));
    ZZ_CUDA(cudaGetLastError());
  }

  void copy(void* to, const void* from, int64_t bytes) override {
    const int blocks = properties_.multiProcessorCount * (properties_.maxThreadsPerMultiProcessor / kBlock);
    copy_kernel<<<blocks, kBlock, 0, stream_.handle>>>(static_cast<uint4*>(to), static_cast<const uint4*>(from),
                                                       bytes / 16);
    ZZ_CUDA(cudaGetLastError());
  }

  std::vector<std::vector<double>> sample(const std::vector<Call>& calls, int num_sets,
                                          int calls_per_reading) override {
    // Graphs of equal size that share out the sets, or one that runs through them several times. The remainder of the
    // division stays unused: a graph that wrapped around would touch what the next graph reads first.
    const int num_graphs = (num_sets + calls_per_reading - 1) / calls_per_reading;
    const int nodes = num_graphs == 1 ? calls_per_reading / num_sets * num_sets : num_sets / num_graphs;
    std::vector<std::vector<std::unique_ptr<Graph>>> graphs(calls.size());  // none of a call that runs alone
    for (std::size_t c = 0; c < calls.size(); ++c) {
      if (calls[c].before) {
        calls[c].before(0);
        calls[c].run(0);
      }
      for (int g = 0; g < num_graphs && !calls[c].before; ++g) {
        graphs[c].push_back(std::make_unique<Graph>(stream_.handle, [&] {
          for (int i = 0; i < nodes; ++i) calls[c].run((g * nodes + i) % num_sets);
        }));
        graphs[c].back()->launch(stream_.handle);
      }
    }
    synchronize();
    std::vector<std::vector<double>> microseconds(calls.size());
    for (int round = 0; round < kReplays; ++round) {
      for (std::size_t c = 0; c < calls.size(); ++c) {
        const std::size_t turn = static_cast<std::size_t>(round) * calls.size() + c;
        if (calls[c].before) {
          const int set = static_cast<int>(turn) % num_sets;
          calls[c].before(set);
          microseconds[c].push_back(clock([&] { calls[c].run(set); }));
        } else {
          const Graph& graph = *graphs[c][turn % graphs[c].size()];
          microseconds[c].push_back(clock([&] { graph.launch(stream_.handle); }) / nodes);
        }
      }
    }
    return microseconds;
  }

 private:
  // Microseconds from the first to the last node of a graph. The hold kernel keeps the queue busy until all three
  // commands are in it.
  double clock(const std::function<void()>& launch) {
    hold_kernel<<<1, 1, 0, stream_.handle>>>(kHoldCycles);
    ZZ_CUDA(cudaEventRecord(start_.handle, stream_.handle));
    launch();
    ZZ_CUDA(cudaEventRecord(stop_.handle, stream_.handle));
    synchronize();
    float milliseconds = 0;
    ZZ_CUDA(cudaEventElapsedTime(&milliseconds, start_.handle, stop_.handle));
    return milliseconds * 1e3;
  }

  void synchronize() { ZZ_CUDA(cudaStreamSynchronize(stream_.handle)); }

  Stream stream_;
  Event start_, stop_;
  cudaDeviceProp properties_{};
  std::shared_ptr<void> never_;
  std::unique_ptr<Cublas> cublas_;
};

}  // namespace

std::unique_ptr<Device> open_cuda() { return std::make_unique<Gpu>(); }

}  // namespace zigzag::bench
