// Codes of many keys on their way to float16 operands of warpgroup products: copied as they are, then widened in their
// order, exactly.
#pragma once

#include "cuda/ptx.cuh"
#include "kernels/prefill/swizzle.h"
#include "kv/formats.h"

namespace zigzag::prefill {
using namespace cuda;  // PTX wrappers and the launch helper

// Low bytes of two halves that are 1024 + byte, less `offset`, which both halves hold. Exact for bytes.
__device__ __forceinline__ uint32_t bytes_as_halves(uint32_t bytes, uint32_t which, uint32_t offset) {
  uint32_t pair = __byte_perm(bytes, 0x64646464u, which);
  asm("sub.f16x2 %0, %0, %1;" : "+r"(pair) : "r"(offset));
  return pair;
}
inline constexpr uint32_t kLowBytes = 0x4140, kHighBytes = 0x4342;  // selectors of bytes_as_halves

__device__ __forceinline__ void widen_four(Fp8, uint32_t codes, uint32_t& low, uint32_t& high) {
  widen_e4m3(codes, low, high);
}

__device__ __forceinline__ void widen_four(Int8, uint32_t codes, uint32_t& low, uint32_t& high) {
  constexpr uint32_t kOffset = 0x64806480u;  // 1024 + 128
  low = bytes_as_halves(codes ^ 0x80808080u, kLowBytes, kOffset);
  high = bytes_as_halves(codes ^ 0x80808080u, kHighBytes, kOffset);
}

// Eight neighbouring codes of a vector as float16: a piece of a row. 8-bit codes are two words, 4-bit codes one, `low`.
template <class Format>
__device__ __forceinline__ uint4 widen_piece(uint32_t low, uint32_t high) {
  uint4 x;
  if constexpr (Format::kBits == 8) {
    widen_four(Format{}, low, x.x, x.y);
    widen_four(Format{}, high, x.z, x.w);
  } else {
    constexpr uint32_t kOffset = 0x64086408u;  // 1024 + 8
    const uint32_t even = low & 0x0f0f0f0fu, odd = low >> 4 & 0x0f0f0f0fu;
    const uint32_t first = __byte_perm(even, odd, 0x5140), second = __byte_perm(even, odd, 0x7362);
    x.x = bytes_as_halves(first, kLowBytes, kOffset), x.y = bytes_as_halves(first, kHighBytes, kOffset);
    x.z = bytes_as_halves(second, kLowBytes, kOffset), x.w = bytes_as_halves(second, kHighBytes, kOffset);
  }
  return x;
}

// A tile of kKeys vectors of codes, which kThreads threads copy and widen: 16 bytes at a time, neighbours in a row by
// neighbouring threads.
template <class Format, int kHeadDim, int kKeys, int kThreads>
struct CodeTile {
  static constexpr int kRowBytes = kHeadDim * Format::kBits / 8;
  static constexpr int kBytes = kKeys * kRowBytes;
  static constexpr int kParts = kRowBytes / 16;               // of a row
  static constexpr int kRowStep = kThreads / kParts;          // from row to row of a thread
  static constexpr int kRowsEach = kKeys / kRowStep;          // of a thread
  static constexpr int kPieces = 16 * 8 / Format::kBits / 8;  // 16-byte pieces of float16 of a part: 2 or 4
  static_assert(kRowBytes % 16 == 0 && kThreads % kParts == 0 && kKeys % kRowStep == 0);

  // Starts the copy of keys [number, number + kKeys), zeros from `count` on.
  static __device__ __forceinline__ void load(const char* vectors, int64_t step, int number, int count, uint32_t codes,
                                              int thread) {
    const int first = number + thread / kParts;
    const char* source = vectors + thread % kParts * 16;
#pragma unroll 2  // more would spill
    for (int i = 0; i < kRowsEach; ++i) {
      const int key = first + i * kRowStep;
      const bool valid = key < count;
      cp_async_16_reused(codes + (i * kThreads + thread) * 16, source + (valid ? key : 0) * step, valid);
    }
  }

  // What this thread has copied, into a tile of float16. Threads of the right half of a row take their pieces in
  // another order, as those of the left half are on the same banks.
  static __device__ __forceinline__ void widen(const unsigned char* codes, unsigned char* tile, int thread) {
    const int part = thread % kParts, turn = part * kPieces / 8 % 2 * (kPieces / 2);
#pragma unroll 2
    for (int i = 0; i < kRowsEach; ++i) {
      const uint4 x = *reinterpret_cast<const uint4*>(codes + (i * kThreads + thread) * 16);
      const uint32_t word[4] = {turn ? x.z : x.x, turn ? x.w : x.y, turn ? x.x : x.z, turn ? x.y : x.w};
      const int row = thread / kParts + i * kRowStep;
#pragma unroll
      for (int j = 0; j < kPieces; ++j) {
        const int piece = part * kPieces + (j ^ turn);
        constexpr int kWords = 4 / kPieces;
        *reinterpret_cast<uint4*>(tile + swizzled_piece(kKeys, row, piece)) =
            widen_piece<Format>(word[j * kWords], word[j * kWords + kWords - 1]);
      }
    }
  }
};

}  // namespace zigzag::prefill
