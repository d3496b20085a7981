// Writes new keys and values to their cache slots.
#pragma once

#include "core/parallel.h"
#include "core/params.h"

namespace zigzag {

void append_kernel_cuda(const AppendParams& params, void* stream);
void append_kernel_cpu(const AppendParams& params, const ParallelFor& parallel);

}  // namespace zigzag
