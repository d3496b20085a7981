// The CUDA side of a captured step: a graph, and the kernel that advances the lengths.
#pragma once

#include <cstdint>
#include <functional>

#include "core/params.h"

namespace zigzag {

struct AdvanceParams {
  int32_t* seq_lens;   // [cache rows]
  const int32_t* pad;  // [batch] or nullptr
  RowMap cache_rows;
  int batch, q_len;
};

// Enqueues seq_lens[cache_rows(b)] += q_len - pad[b], with pad[b] cut to [0, q_len], for rows that are not skipped.
void advance_lengths_cuda(const AdvanceParams& params, void* stream);

class StepGraph {
 public:
  // Captures what `enqueue` puts on `stream`. An exception of `enqueue` ends the capture and goes on to the caller.
  StepGraph(const std::function<void()>& enqueue, void* stream);
  ~StepGraph();
  StepGraph(const StepGraph&) = delete;
  StepGraph& operator=(const StepGraph&) = delete;

  void launch(void* stream) const;
  int num_nodes() const { return num_nodes_; }

 private:
  void* executable_ = nullptr;
  int num_nodes_ = 0;
};

}  // namespace zigzag
