// The CPU entry of every op: calls the build of the kernel that cpu_isa() picks.
#include "cpu/isa.h"
#include "kernels/append/append.h"
#include "kernels/decode/full/full.h"
#include "kernels/decode/stream/stream.h"
#include "kernels/merge/merge.h"
#include "kernels/prefill/prefill.h"

#if defined(__x86_64__)
#define ZZ_CPU_OP(op, Params)                                        \
  namespace baseline {                                               \
  void op(const Params& params, const ParallelFor& parallel);        \
  }                                                                  \
  namespace avx2 {                                                   \
  void op(const Params& params, const ParallelFor& parallel);        \
  }                                                                  \
  namespace avx512 {                                                 \
  void op(const Params& params, const ParallelFor& parallel);        \
  }                                                                  \
  void op(const Params& params, const ParallelFor& parallel) {       \
    switch (cpu_isa()) {                                             \
      case CpuIsa::kBaseline: return baseline::op(params, parallel); \
      case CpuIsa::kAvx2: return avx2::op(params, parallel);         \
      case CpuIsa::kAvx512: return avx512::op(params, parallel);     \
    }                                                                \
  }
#else
#define ZZ_CPU_OP(op, Params)                                  \
  namespace baseline {                                         \
  void op(const Params& params, const ParallelFor& parallel);  \
  }                                                            \
  void op(const Params& params, const ParallelFor& parallel) { \
    cpu_isa(); /* rejects a bad ZIGZAG_CPU_ISA */              \
    baseline::op(params, parallel);                            \
  }
#endif

namespace zigzag {

ZZ_CPU_OP(append_kernel_cpu, AppendParams)
ZZ_CPU_OP(merge_kernel_cpu, MergeParams)
ZZ_CPU_OP(decode_full_cpu, AttentionParams)
ZZ_CPU_OP(decode_stream_cpu, AttentionParams)
ZZ_CPU_OP(prefill_cpu, AttentionParams)

}  // namespace zigzag
