#include "kernels/cpu/attention.h"

namespace zigzag::ZIGZAG_CPU_ISA {

// All tokens in one block: every cached key is read once.
void decode_stream_cpu(const AttentionParams& p, const ParallelFor& parallel) {
  attention_blocks(p, parallel, p.q_len);
}

}  // namespace zigzag::ZIGZAG_CPU_ISA
