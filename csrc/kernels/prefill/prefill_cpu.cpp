#include "kernels/cpu/attention.h"

namespace zigzag::ZIGZAG_CPU_ISA {

// Rows of a block: enough to pay for the widening of a tile, few enough for queries and sums to stay in a 512 KiB L2.
constexpr int kPrefillRows = 64;

void prefill_cpu(const AttentionParams& p, const ParallelFor& parallel) {
  attention_blocks(p, parallel, std::max(1, kPrefillRows * p.num_kv_heads / p.num_q_heads));
}

}  // namespace zigzag::ZIGZAG_CPU_ISA
