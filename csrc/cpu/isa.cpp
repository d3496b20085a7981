#include "cpu/isa.h"

#include <cstdlib>
#include <string_view>

#include "core/error.h"

namespace zigzag {
namespace {

constexpr CpuIsa kWidestFirst[] = {CpuIsa::kAvx512, CpuIsa::kAvx2, CpuIsa::kBaseline};

}  // namespace

bool cpu_supports(CpuIsa isa) {
  switch (isa) {
    case CpuIsa::kBaseline: return true;
#if defined(__x86_64__)
    // F16C is older than AVX2: no processor has the second without the first.
    case CpuIsa::kAvx2: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case CpuIsa::kAvx512:
      return cpu_supports(CpuIsa::kAvx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
    default: return false;
  }
}

CpuIsa cpu_isa() {
  const char* forced = std::getenv("ZIGZAG_CPU_ISA");
  const bool automatic = forced == nullptr || *forced == '\0';
  for (CpuIsa isa : kWidestFirst) {
    if (!automatic && std::string_view(forced) != name(isa)) continue;
    if (cpu_supports(isa)) return isa;
    ZZ_CHECK(automatic, "ZIGZAG_CPU_ISA is ", forced, ", which this processor does not support");
  }
  throw Error(concat("ZIGZAG_CPU_ISA is '", forced, "'; supported: baseline, avx2, avx512"));
}

}  // namespace zigzag
