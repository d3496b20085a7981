// One register of floats per instruction set, all with the same interface, so that a CPU kernel is written once.
//
// The build defines ZIGZAG_CPU_ISA (the namespace: baseline, avx2 or avx512) and, for the latter two,
// ZIGZAG_CPU_VEC_BITS (256 or 512). Everything here lives in that namespace: a function that two builds shared by name
// could be linked from the wrong one and fault on an older processor. The baseline uses the vector extensions of GCC
// and Clang (SSE2, NEON, ...).
#pragma once

#include <cstdint>
#include <cstring>

#include "core/types.h"

#if defined(ZIGZAG_CPU_VEC_BITS)
#include <immintrin.h>
#else
#define ZIGZAG_CPU_VEC_BITS 128
#endif

namespace zigzag::ZIGZAG_CPU_ISA {

#if ZIGZAG_CPU_VEC_BITS > 128
inline void scatter(__m128 x, float* to_0, float* to_1, float* to_2, float* to_3) {
  _mm_store_ss(to_0, x);
  _mm_store_ss(to_1, _mm_movehdup_ps(x));
  _mm_store_ss(to_2, _mm_movehl_ps(x, x));
  _mm_store_ss(to_3, _mm_permute_ps(x, 3));
}
#endif

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// f(T{}) with the element type of `dtype`.
template <class F>
void dispatch_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32: return f(float{});
    case DType::kFloat16: return f(Float16{});
    case DType::kBFloat16: return f(BFloat16{});
  }
}

#if ZIGZAG_CPU_VEC_BITS == 512

struct Vec {
  static constexpr int kWidth = 16;
  __m512 v;

  static Vec fill(float x) { return {_mm512_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vec load(const BFloat16* p) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_half(p)), 16))};
  }
  static Vec load(const Float16* p) { return {_mm512_cvtph_ps(load_half(p))}; }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(BFloat16* p) const {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded =
        _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff)), 16);
    const __m512i nan = _mm512_set1_epi32(0x7fc0);
    const __m512i result = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), nan);
    store_half(p, _mm512_cvtepi32_epi16(result));
  }
  void store(Float16* p) const { store_half(p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)); }

  friend Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
  friend Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
  // Keeps a loaded value in its register: GCC would rather load it again for each use, and loads are what runs out.
  Vec pinned() const {
    Vec copy = *this;
    asm("" : "+v"(copy.v));
    return copy;
  }
  static Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  static Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
  // 2^n for n held in the low bits of the float `biased` (see exp2).
  static Vec power(Vec biased) {
    const __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(biased.v), 23);
    return {_mm512_castsi512_ps(_mm512_add_epi32(exponent, _mm512_set1_epi32(0x3f800000)))};
  }
  static Vec zero_where_less(Vec x, Vec limit, Vec value) {
    return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, limit.v, _CMP_NLT_UQ), value.v)};
  }
  float max() const { return _mm512_reduce_max_ps(v); }
  float sum() const { return _mm512_reduce_add_ps(v); }
  // *to_a = sum of a, ...
  static void sum4(Vec a, Vec b, Vec c, Vec d, float* to_a, float* to_b, float* to_c, float* to_d) {
    const __m256 ab = _mm256_hadd_ps(fold(a), fold(b)), cd = _mm256_hadd_ps(fold(c), fold(d));
    const __m256 abcd = _mm256_hadd_ps(ab, cd);
    const __m128 sums = _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1));
    scatter(sums, to_a, to_b, to_c, to_d);
  }

 private:
  static __m256 fold(Vec x) { return _mm256_add_ps(_mm512_castps512_ps256(x.v), _mm512_extractf32x8_ps(x.v, 1)); }
  static __m256i load_half(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static void store_half(void* p, __m256i x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
};

#elif ZIGZAG_CPU_VEC_BITS == 256

struct Vec {
  static constexpr int kWidth = 8;
  __m256 v;

  static Vec fill(float x) { return {_mm256_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Vec load(const BFloat16* p) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_half(p)), 16))};
  }
  static Vec load(const Float16* p) { return {_mm256_cvtph_ps(load_half(p))}; }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(BFloat16* p) const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff)), 16);
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i result = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), is_nan);
    store_half(p, _mm_packus_epi32(_mm256_castsi256_si128(result), _mm256_extracti128_si256(result, 1)));
  }
  void store(Float16* p) const { store_half(p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)); }

  friend Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
  friend Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
  friend Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
  // Keeps a loaded value in its register: GCC would rather load it again for each use, and loads are what runs out.
  Vec pinned() const {
    Vec copy = *this;
    asm("" : "+x"(copy.v));
    return copy;
  }
  static Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  static Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
  // 2^n for n held in the low bits of the float `biased` (see exp2).
  static Vec power(Vec biased) {
    const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(biased.v), 23);
    return {_mm256_castsi256_ps(_mm256_add_epi32(exponent, _mm256_set1_epi32(0x3f800000)))};
  }
  static Vec zero_where_less(Vec x, Vec limit, Vec value) {
    return {_mm256_and_ps(_mm256_cmp_ps(x.v, limit.v, _CMP_NLT_UQ), value.v)};
  }
  float max() const {
    const __m128 half = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 quarter = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(quarter, _mm_movehdup_ps(quarter)));
  }
  float sum() const {
    const __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 quarter = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
  }
  // *to_a = sum of a, ...
  static void sum4(Vec a, Vec b, Vec c, Vec d, float* to_a, float* to_b, float* to_c, float* to_d) {
    const __m256 abcd = _mm256_hadd_ps(_mm256_hadd_ps(a.v, b.v), _mm256_hadd_ps(c.v, d.v));
    const __m128 sums = _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1));
    scatter(sums, to_a, to_b, to_c, to_d);
  }

 private:
  static __m128i load_half(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
  static void store_half(void* p, __m128i x) { _mm_storeu_si128(static_cast<__m128i*>(p), x); }
};

#else

struct Vec {
  static constexpr int kWidth = 4;
  using Floats = float __attribute__((vector_size(16)));
  using Bits = uint32_t __attribute__((vector_size(16)));
  using Halves = uint16_t __attribute__((vector_size(8)));
  Floats v;

  static Vec fill(float x) { return {Floats{x, x, x, x}}; }
  static Vec load(const float* p) { return {read<Floats>(p)}; }
  static Vec load(const BFloat16* p) { return {as_floats(widen(p) << 16)}; }
  static Vec load(const Float16* p) {
    const Bits half = widen(p), sign = (half & 0x8000u) << 16, magnitude = (half & 0x7fffu) << 13;
    // Moves the exponent bias from 15 to 127 and normalises subnormals in one exact multiplication.
    const Bits finite = as_bits(as_floats(magnitude) * 0x1p112f);
    const Bits special = Bits(magnitude >= (0x7c00u << 13)) & 0x7f800000u;
    return {as_floats(finite | special | sign)};
  }
  void store(float* p) const { std::memcpy(p, &v, sizeof(v)); }
  void store(BFloat16* p) const {
    const Bits bits = as_bits(v), is_nan = Bits(v != v);
    const Bits rounded = (bits + ((bits >> 16) & 1u) + 0x7fffu) >> 16;
    narrow(p, (rounded & ~is_nan) | (is_nan & 0x7fc0u));
  }
  void store(Float16* p) const {
    const Bits bits = as_bits(v), magnitude = bits & 0x7fffffffu;
    const Bits normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
    // Below 2^-14 the spacing is 2^-24, which is that of floats just above 0.5.
    const Bits subnormal = as_bits(as_floats(magnitude) + 0.5f) - 0x3f000000u;
    const Bits is_small = Bits(magnitude < 0x38800000u), is_big = Bits(magnitude >= 0x477ff000u);
    const Bits is_nan = Bits(v != v);
    const Bits finite = (is_small & subnormal) | (~is_small & normal);
    narrow(p, (~is_big & finite) | (is_big & 0x7c00u) | (is_nan & 0x7e00u) | ((bits >> 16) & 0x8000u));
  }

  friend Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
  friend Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
  friend Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
  Vec pinned() const { return *this; }
  static Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
  static Vec max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
  // 2^n for n held in the low bits of the float `biased` (see exp2).
  static Vec power(Vec biased) { return {as_floats((as_bits(biased.v) << 23) + 0x3f800000u)}; }
  static Vec zero_where_less(Vec x, Vec limit, Vec value) {
    return {as_floats(~Bits(x.v < limit.v) & as_bits(value.v))};
  }
  float max() const {
    const float a = v[0] > v[1] ? v[0] : v[1], b = v[2] > v[3] ? v[2] : v[3];
    return a > b ? a : b;
  }
  float sum() const { return (v[0] + v[1]) + (v[2] + v[3]); }
  // *to_a = sum of a, ...
  static void sum4(Vec a, Vec b, Vec c, Vec d, float* to_a, float* to_b, float* to_c, float* to_d) {
    *to_a = a.sum(), *to_b = b.sum(), *to_c = c.sum(), *to_d = d.sum();
  }

 private:
  template <class To>
  static To read(const void* p) {
    To to;
    std::memcpy(&to, p, sizeof(to));
    return to;
  }
  static Floats as_floats(Bits x) { return read<Floats>(&x); }
  static Bits as_bits(Floats x) { return read<Bits>(&x); }
  static Bits widen(const void* p) { return __builtin_convertvector(read<Halves>(p), Bits); }
  static void narrow(void* p, Bits x) {
    const Halves halves = __builtin_convertvector(x, Halves);
    std::memcpy(p, &halves, sizeof(halves));
  }
};

#endif

// 2^x for x <= 127, relative error below 2e-7; exactly 0 below -126, NaN for NaN.
// The polynomial is that of Cephes' exp2f (https://www.netlib.org/cephes/) on [-0.5, 0.5].
inline Vec exp2(Vec x) {
  const Vec lowest = Vec::fill(-126.0f), magic = Vec::fill(0x1.8p23f);  // adding `magic` rounds to an integer
  const Vec biased = Vec::max(lowest, x) + magic;
  const Vec f = Vec::max(lowest, x) - (biased - magic);
  Vec y = Vec::fill(1.535336188319500e-4f);
  y = Vec::fma(y, f, Vec::fill(1.339887440266574e-3f));
  y = Vec::fma(y, f, Vec::fill(9.618437357674640e-3f));
  y = Vec::fma(y, f, Vec::fill(5.550332471162809e-2f));
  y = Vec::fma(y, f, Vec::fill(2.402264791363012e-1f));
  y = Vec::fma(y, f, Vec::fill(6.931472028550421e-1f));
  y = Vec::fma(y, f, Vec::fill(1.0f));
  return Vec::zero_where_less(x, lowest, y * Vec::power(biased));
}

inline float exp2(float x) { return exp2(Vec::fill(x)).max(); }

}  // namespace zigzag::ZIGZAG_CPU_ISA
