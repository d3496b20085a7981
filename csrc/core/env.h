// Environment variables that the compiled code reads, in one table with one strict parser.
#pragma once

#include <string>

namespace zigzag {

enum class Env {
  kCpuIsa,
  kForcePlain,
  kDependentLaunch,
  kCluster,
  kSpread,
  kWarps,
  kBlocks,
  kPrefillKernel,
  kPrefillSplits
};

struct EnvVariable {
  Env id;
  const char* name;
  const char* allowed;  // words separated by ", ", or "LEAST to MOST" for an integer
  const char* meaning;
};

// Where a variable is unset or empty, the code decides.
inline constexpr EnvVariable kEnvVariables[] = {
    {Env::kCpuIsa, "ZIGZAG_CPU_ISA", "baseline, avx2, avx512",
     "instruction set of the CPU kernels; default: the widest that the processor has"},
    {Env::kForcePlain, "ZIGZAG_FORCE_PLAIN", "0, 1",
     "1: CUDA kernels use nothing above sm_80: no clusters, no programmatic dependent launch"},
    {Env::kDependentLaunch, "ZIGZAG_DEPENDENT_LAUNCH", "0, 1",
     "1: programmatic dependent launch where the kernel supports it"},
    {Env::kCluster, "ZIGZAG_CLUSTER", "0, 1, 2, 4, 8, 16",
     "blocks per cluster; decode_full takes this size or no clusters, of a batch too; 0: as measured to be best"},
    {Env::kSpread, "ZIGZAG_SPREAD", "0 to 16",
     "clusters that share a KV head of decode_full, of a batch too; 0: as measured to be best"},
    {Env::kWarps, "ZIGZAG_WARPS", "0 to 8", "most warps per block of decode kernels; 0: as measured to be best"},
    {Env::kBlocks, "ZIGZAG_BLOCKS", "0 to 320",
     "blocks of decode_full's runs, which then serve one row, too, where clusters do not; 0: as measured to be best"},
    {Env::kPrefillKernel, "ZIGZAG_PREFILL_KERNEL", "auto, tiles",
     "tiles: chunks of prompts never take the pipeline kernel of sm_90a; auto: wherever it serves"},
    {Env::kPrefillSplits, "ZIGZAG_PREFILL_SPLITS", "0 to 160",
     "blocks of the pipeline kernel that share the keys of a tile of query rows; 0: as many as fill the GPU"},
};

// The value, or "" where the variable is unset or empty. Throws zigzag::Error, naming the variable, its value and the
// allowed ones, on any other value than those of the table.
std::string env_text(Env variable);

// As env_text, for a variable whose values are integers; 0 where it is unset or empty.
int env_integer(Env variable);

}  // namespace zigzag
