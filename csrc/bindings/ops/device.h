// Where an op runs: torch's current CUDA stream, or torch's CPU threads.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "core/parallel.h"

namespace zigzag::bindings {

// cudaStream_t of torch's current stream on the tensor's device.
void* current_cuda_stream(const torch::stable::Tensor& tensor);

// Runs bodies on torch's intra-op thread pool.
ParallelFor torch_parallel_for();

}  // namespace zigzag::bindings
