// Attention over quantised caches on CUDA. A chunk longer than kMaxDecodeQueries that no prefill kernel serves
// (prefill_codes_cuda) runs as several launches of the decode kernels, each of which appends before the next one reads:
// a prompt needs no scratch, and every chunking attends the same codes.
#pragma once

#include "core/params.h"

namespace zigzag {

// Head dims with kernels for quantised caches: two of the five, as each costs minutes of compilation.
constexpr bool has_code_kernels(int head_dim) { return head_dim == 64 || head_dim == 128; }

// Throws zigzag::Error on a pair of formats, a head_dim or an empty cache that no kernel serves.
void attention_codes_cuda(const AttentionParams& params, void* stream);

}  // namespace zigzag
