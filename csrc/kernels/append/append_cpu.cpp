#include "kernels/append/append_cpu.h"

#include "core/parallel.h"

namespace zigzag::ZIGZAG_CPU_ISA {

void append_kernel_cpu(const AppendParams& p, const ParallelFor& parallel) {
  parallel.run(static_cast<int64_t>(p.batch) * p.num_kv_heads, [&p](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      append_head(p, static_cast<int>(i / p.num_kv_heads), static_cast<int>(i % p.num_kv_heads));
    }
  });
}

}  // namespace zigzag::ZIGZAG_CPU_ISA
