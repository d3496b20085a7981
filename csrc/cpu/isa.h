// Which build of the CPU kernels runs. Every csrc/kernels/*/*_cpu.cpp is compiled once per entry below, each time in
// the namespace of its name; kernels/cpu_dispatch.cpp calls the one that cpu_isa() returns.
#pragma once

namespace zigzag {

enum class CpuIsa { kBaseline, kAvx2, kAvx512 };

constexpr const char* name(CpuIsa isa) {
  switch (isa) {
    case CpuIsa::kBaseline: return "baseline";
    case CpuIsa::kAvx2: return "avx2";
    case CpuIsa::kAvx512: return "avx512";
  }
  return "unknown";
}

// Whether this build has kernels for `isa` and this processor runs them.
bool cpu_supports(CpuIsa isa);

// The widest supported set, or the one that ZIGZAG_CPU_ISA names (core/env.h). Throws zigzag::Error if that variable
// names anything else or a set that this processor lacks. Read on every call.
CpuIsa cpu_isa();

}  // namespace zigzag
