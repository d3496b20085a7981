// Attention of any number of new tokens over the cache and themselves, for full caches and rings, then the append.
#pragma once

#include "core/parallel.h"
#include "core/params.h"

namespace zigzag {

void prefill_cuda(const AttentionParams& params, void* stream);

// The same over a quantised cache, whose new tokens are appended first and attended as their codes. False, and nothing
// launched, where no kernel serves it.
bool prefill_codes_cuda(const AttentionParams& params, void* stream);
void prefill_cpu(const AttentionParams& params, const ParallelFor& parallel);

}  // namespace zigzag
