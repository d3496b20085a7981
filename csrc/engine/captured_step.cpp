#include "engine/captured_step.h"

#include <algorithm>
#include <limits>

#include "core/error.h"
#include "engine/step_graph.h"

namespace zigzag {

CapturedStep::CapturedStep(const Scheduler& scheduler, const Step& step, const Scheduler::LayerCall& tensors,
                           int64_t longest, void* stream, const std::function<void()>& after)
    : capacity_(std::numeric_limits<int32_t>::max()), q_len_(step.q_len) {
  ZZ_CHECK(stream != nullptr, "the default stream cannot be captured; pass one made by cudaStreamCreate");
  ZZ_CHECK(step.batch >= 1 && step.q_len >= 1, "a captured step needs batch >= 1 and q_len >= 1, got batch ",
           step.batch, " and q_len ", step.q_len);
  set_longest(longest);
  const auto enqueue = [&] {
    scheduler.step_cuda(
        step,
        [&](int layer) {
          const LayerTensors given = tensors(layer);
          const std::vector<CacheSpec>& specs = scheduler.caches(layer);
          for (std::size_t i = 0; i < specs.size(); ++i) {
            const int64_t slots = given.caches[i].capacity;  // 0: the layer caches nothing
            if (specs[i].kind == LayerKind::kRetrieval && slots > 0) capacity_ = std::min(capacity_, slots);
          }
          return given;
        },
        stream);
    if (after) after();
    advance_lengths_cuda({step.seq_lens, step.pad, step.cache_rows, step.batch, step.q_len}, stream);
  };
  graph_ = std::make_unique<StepGraph>(enqueue, stream);
}

CapturedStep::~CapturedStep() = default;
CapturedStep::CapturedStep(CapturedStep&&) noexcept = default;
CapturedStep& CapturedStep::operator=(CapturedStep&&) noexcept = default;

void CapturedStep::replay(void* stream) {
  ZZ_CHECK(longest_ + q_len_ <= capacity_, "the caches are full: they hold ", capacity_,
           " tokens a row, the longest row has ", longest_, " and this step adds ", q_len_, "; nothing was launched");
  graph_->launch(stream);
  longest_ += q_len_;
}

void CapturedStep::set_longest(int64_t tokens) {
  ZZ_CHECK(tokens >= 0, "the longest row must hold >= 0 tokens, got ", tokens);
  longest_ = tokens;
}

int CapturedStep::num_nodes() const { return graph_->num_nodes(); }

#if !ZIGZAG_WITH_CUDA
void advance_lengths_cuda(const AdvanceParams&, void*) {}
StepGraph::StepGraph(const std::function<void()>&, void*) {
  throw Error(
      "this build of zigzag_ext has no CUDA kernels, so it captures no graphs; rebuild with nvcc on the PATH or "
      "ZIGZAG_CUDA=on");
}
StepGraph::~StepGraph() = default;
void StepGraph::launch(void*) const {}
#endif

}  // namespace zigzag
