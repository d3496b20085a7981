#include "engine/captured_step.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "core/error.h"
#include "engine/step_graph.h"

namespace zigzag {
namespace {

// What all layers of a step have in common, taken from the first.
class StepShape {
 public:
  explicit StepShape(const int32_t* seq_lens) : seq_lens_(seq_lens) {}

  void add(int layer, const AttentionParams& p) {
    if (layer == 0) {
      ZZ_CHECK(p.batch >= 1 && p.q_len >= 1, "a captured step needs batch >= 1 and q_len >= 1, got batch ", p.batch,
               " and q_len ", p.q_len);
      first_ = p;
    }
    ZZ_CHECK(p.batch == first_.batch && p.q_len == first_.q_len, "all layers of a step must have one batch and q_len; ",
             "layer 0 has ", first_.batch, " and ", first_.q_len, ", layer ", layer, " has ", p.batch, " and ",
             p.q_len);
    ZZ_CHECK(p.seq_lens == seq_lens_ && p.pad == first_.pad,
             "all layers of a step must share pad and the given seq_lens; layer ", layer, " has others");
    if (p.window == 0 && p.slots > 0) capacity_ = std::min<int64_t>(capacity_, p.slots);
  }

  const AttentionParams& first() const { return first_; }
  int64_t capacity() const { return capacity_; }

 private:
  const int32_t* seq_lens_;
  AttentionParams first_{};
  int64_t capacity_ = std::numeric_limits<int32_t>::max();
};

}  // namespace

CapturedStep::CapturedStep(const Scheduler& scheduler, const Scheduler::LayerTensors& tensors, int32_t* seq_lens,
                           int64_t longest, void* stream) {
  ZZ_CHECK(stream != nullptr, "the default stream cannot be captured; pass one made by cudaStreamCreate");
  set_longest(longest);
  StepShape shape(seq_lens);
  const auto enqueue = [&] {
    scheduler.step_cuda(
        [&](int layer) {
          const AttentionParams given = tensors(layer);
          shape.add(layer, scheduler.layer_params(layer, given));
          return given;
        },
        stream);
    const AttentionParams& p = shape.first();
    advance_lengths_cuda({seq_lens, p.pad, p.batch, p.q_len}, stream);
  };
  graph_ = std::make_unique<StepGraph>(enqueue, stream);
  capacity_ = shape.capacity();
  q_len_ = shape.first().q_len;
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
