#include "core/params.h"
#include "cuda/launch.h"
#include "engine/step_graph.h"

namespace zigzag {
namespace {

constexpr int kThreads = 256;

// One block for all rows.
__global__ void __launch_bounds__(kThreads) advance_kernel(const __grid_constant__ AdvanceParams p) {
  for (int b = threadIdx.x; b < p.batch; b += kThreads) {
    const int row = p.cache_rows(b);
    if (row >= 0) p.seq_lens[row] += p.q_len - (p.pad == nullptr ? 0 : clamp_padding(p.pad[b], p.q_len));
  }
}

// A capture under way. Ends with this object at the latest, so that an error leaves the stream usable.
class Capture {
 public:
  explicit Capture(cudaStream_t stream) : stream_(stream) {
    ZZ_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    open_ = true;
  }
  ~Capture() {
    cudaGraph_t abandoned = nullptr;
    if (open_ && cudaStreamEndCapture(stream_, &abandoned) == cudaSuccess) cudaGraphDestroy(abandoned);
    if (graph_ != nullptr) cudaGraphDestroy(graph_);
    if (open_) cudaGetLastError();  // a capture that failed leaves its error behind
  }
  Capture(const Capture&) = delete;
  Capture& operator=(const Capture&) = delete;

  cudaGraph_t end() {
    ZZ_CUDA(cudaStreamEndCapture(stream_, &graph_));
    open_ = false;
    return graph_;
  }

 private:
  cudaStream_t stream_;
  cudaGraph_t graph_ = nullptr;
  bool open_ = false;
};

}  // namespace

void advance_lengths_cuda(const AdvanceParams& params, void* stream) {
  cuda::LaunchConfig config;
  config.grid = dim3(1);
  config.block = dim3(kThreads);
  cuda::launch(advance_kernel, config, params, stream);
}

StepGraph::StepGraph(const std::function<void()>& enqueue, void* stream) {
  Capture capture(static_cast<cudaStream_t>(stream));
  enqueue();
  cudaGraph_t graph = capture.end();
  size_t nodes = 0;
  ZZ_CUDA(cudaGraphGetNodes(graph, nullptr, &nodes));
  num_nodes_ = static_cast<int>(nodes);
  cudaGraphExec_t executable = nullptr;
  ZZ_CUDA(cudaGraphInstantiate(&executable, graph, 0));
  executable_ = executable;
}

StepGraph::~StepGraph() { cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(executable_)); }

void StepGraph::launch(void* stream) const {
  ZZ_CUDA(cudaGraphLaunch(static_cast<cudaGraphExec_t>(executable_), static_cast<cudaStream_t>(stream)));
}

}  // namespace zigzag
