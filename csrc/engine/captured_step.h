// A decode step of all layers as one CUDA graph: captured once, replayed for every length, never captured again. The
// lengths live on the device; the graph advances them itself, so a replay needs no upload and never waits.
#pragma once

#include <memory>

#include "engine/scheduler.h"

namespace zigzag {

class StepGraph;

class CapturedStep {
 public:
  // Captures scheduler.step_cuda(step, tensors) on `stream` (a cudaStream_t; the default stream cannot be captured)
  // and, behind it, one kernel that adds q_len - pad[b] to the length of each batch row's cache row. Runs nothing.
  // `tensors` may enqueue work of its own on `stream`: it becomes part of the step, as does what `after` enqueues
  // behind the last layer. Every address it names must stay valid.
  //
  // `longest` counts the tokens of the longest row now. Throws zigzag::Error on batch or q_len < 1, on what the
  // scheduler refuses and in a build without CUDA; the stream is then as it was.
  CapturedStep(const Scheduler& scheduler, const Step& step, const Scheduler::LayerCall& tensors, int64_t longest,
               void* stream, const std::function<void()>& after = nullptr);
  ~CapturedStep();
  CapturedStep(CapturedStep&&) noexcept;
  CapturedStep& operator=(CapturedStep&&) noexcept;

  // Enqueues the step on `stream`, any stream of the same device. Throws, with nothing enqueued, where the longest row
  // would outgrow the smallest full cache.
  void replay(void* stream);

  int64_t longest() const { return longest_; }    // tokens of the longest row after all replays; with padding at most
  int64_t capacity() const { return capacity_; }  // tokens that every layer can hold; 2^31 - 1 for rings alone
  // Where the caller has written seq_lens by other means: a prompt, a reset, rows taken out. Throws on less than 0.
  void set_longest(int64_t tokens);

  int num_nodes() const;  // of the graph: launches_per_step(), one for the lengths, and what the caller has enqueued

 private:
  int64_t longest_, capacity_;
  int q_len_;
  std::unique_ptr<StepGraph> graph_;
};

}  // namespace zigzag
