// Launch of the prefill kernel for one kind of block. Included once per kind and dtype, so that they compile in
// parallel.
#pragma once

#include <climits>

#include "core/dispatch.h"
#include "cuda/launch.h"
#include "kernels/prefill/prefill.cuh"

namespace zigzag::prefill {
using namespace cuda;  // PTX wrappers and the launch helper

template <class Block>
void launch_prefill_block(const AttentionParams& p, void* stream) {
  const int64_t rows = static_cast<int64_t>(p.q_len) * (p.num_q_heads / p.num_kv_heads);
  const int64_t blocks = (rows + Block::kRows - 1) / Block::kRows * p.batch * p.num_kv_heads;
  ZZ_CHECK(rows <= INT_MAX - Block::kRows && blocks <= INT_MAX, "q_len ", p.q_len, " with batch ", p.batch, " and ",
           p.num_q_heads, " query heads is more than one launch can hold; split the chunk");
  LaunchConfig config;
  config.grid = dim3(static_cast<unsigned>(blocks));
  config.block = dim3(Block::kThreads);
  config.shared_bytes = Block::kSharedBytes;
  launch(p.softcap > 0.0f ? prefill_kernel<Block, true> : prefill_kernel<Block, false>, config, p, stream);
}

}  // namespace zigzag::prefill
