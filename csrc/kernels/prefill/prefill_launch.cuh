// Launch of the prefill kernel for one dtype. Included once per dtype, so that the two compile in parallel.
#pragma once

#include <climits>

#include "core/dispatch.h"
#include "kernels/prefill/prefill.cuh"

namespace zigzag::device {

template <class T>
void launch_prefill(const AttentionParams& p, void* stream) {
  dispatch_head_dim(p.head_dim, [&](auto head_dim) {
    using Shape = PrefillShape<decltype(head_dim)::value>;
    const int64_t rows = static_cast<int64_t>(p.q_len) * (p.num_q_heads / p.num_kv_heads);
    const int64_t blocks = (rows + Shape::kRows - 1) / Shape::kRows * p.batch * p.num_kv_heads;
    ZZ_CHECK(rows <= INT_MAX - Shape::kRows && blocks <= INT_MAX, "q_len ", p.q_len, " with batch ", p.batch, " and ",
             p.num_q_heads, " query heads is more than one launch can hold; split the chunk");
    LaunchConfig config;
    config.grid = dim3(static_cast<unsigned>(blocks));
    config.block = dim3(Shape::kThreads);
    config.shared_bytes = Shape::kSharedBytes;
    launch(prefill_kernel<T, decltype(head_dim)::value>, config, p, stream);
  });
}

}  // namespace zigzag::device
