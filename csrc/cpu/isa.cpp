#include "cpu/isa.h"

#include <string>

#include "core/env.h"
#include "core/error.h"

namespace zigzag {
namespace {

constexpr CpuIsa kWidestFirst[] = {CpuIsa::kAvx512, CpuIsa::kAvx2, CpuIsa::kBaseline};

std::string supported_names() {
  std::string names;
  for (CpuIsa isa : kWidestFirst) {
    if (cpu_supports(isa)) names = name(isa) + (names.empty() ? "" : ", " + names);
  }
  return names;
}

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
  const std::string forced = env_text(Env::kCpuIsa);
  for (CpuIsa isa : kWidestFirst) {
    if (!forced.empty() && forced != name(isa)) continue;
    if (cpu_supports(isa)) return isa;
    ZZ_CHECK(forced.empty(), "ZIGZAG_CPU_ISA is '", forced,
             "', which this processor does not have; supported here: ", supported_names());
  }
  return CpuIsa::kBaseline;
}

}  // namespace zigzag
