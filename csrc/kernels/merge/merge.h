// Merge of two partial attention states by their log-sum-exp.
#pragma once

#include "core/parallel.h"
#include "core/params.h"

namespace zigzag {

void merge_kernel_cuda(const MergeParams& params, void* stream);
void merge_kernel_cpu(const MergeParams& params, const ParallelFor& parallel);

}  // namespace zigzag
