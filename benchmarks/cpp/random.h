// Counter-based random numbers, the same on host and device: element i of stream `seed` never depends on who computes
// it.
#pragma once

#include <cstdint>
#include <cstring>

#include "kv/ring.h"  // ZZ_HOST_DEVICE

namespace zigzag::bench {

// SplitMix64 of seed and index (https://prng.di.unimi.it/splitmix64.c).
ZZ_HOST_DEVICE uint64_t random_bits(uint64_t seed, uint64_t index) {
  uint64_t x = seed * 0xD1B54A32D192ED03ull + (index + 1) * 0x9E3779B97F4A7C15ull;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

// Mean 0, variance 1: the sum of four 16-bit uniforms, normal to within 3.5 standard deviations and cheap enough to
// fill gigabytes on two CPU cores.
ZZ_HOST_DEVICE float random_normal(uint64_t seed, uint64_t index) {
  const uint64_t bits = random_bits(seed, index);
  const int sum = static_cast<int>((bits & 0xFFFF) + ((bits >> 16) & 0xFFFF) + ((bits >> 32) & 0xFFFF) + (bits >> 48));
  return (static_cast<float>(sum) - 131070.0f) * (1.7320508f / 65536.0f);
}

}  // namespace zigzag::bench
