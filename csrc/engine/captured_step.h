// A decode step of all layers as one CUDA graph: captured once, replayed for every length, never captured again. The
// lengths live on the device; the graph advances them itself, so a replay needs no upload and never waits.
#pragma once

#include <memory>

#include "engine/scheduler.h"

namespace zigzag {

class StepGraph;

class CapturedStep {
 public:
  // Captures scheduler.step_cuda(tensors) on `stream` (a cudaStream_t; the default stream cannot be captured) and,
  // behind it, one kernel for seq_lens[b] += q_len - pad[b]. Runs nothing. `tensors` may enqueue work of its own on
  // `stream`: it becomes part of the step. Every address it names must stay valid.
  //
  // All layers must name the same batch, q_len and pad, and these seq_lens ([batch] on the device). `longest` counts
  // the tokens of the longest row now. Throws zigzag::Error on anything else and in a build without CUDA; the stream is
  // then as it was.
  CapturedStep(const Scheduler& scheduler, const Scheduler::LayerTensors& tensors, int32_t* seq_lens, int64_t longest,
               void* stream);
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

  int num_nodes() const;  // of the graph: one kernel per layer, one for the lengths, and what `tensors` has enqueued

 private:
  int64_t longest_, capacity_;
  int q_len_;
  std::unique_ptr<StepGraph> graph_;
};

}  // namespace zigzag
