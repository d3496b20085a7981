#include <algorithm>
#include <cmath>

#include "core/parallel.h"
#include "core/params.h"
#include "cpu/vec.h"

namespace zigzag::ZIGZAG_CPU_ISA {
namespace {

template <class T>
void merge_row(const MergeParams& p, int64_t row) {
  const float a = p.lse_a[row], b = p.lse_b[row];
  const float high = std::isnan(b) ? b : std::max(a, b);  // NaN in either state is NaN in the result
  const T* out_a = static_cast<const T*>(p.out_a) + row * p.head_dim;
  const T* out_b = static_cast<const T*>(p.out_b) + row * p.head_dim;
  T* out = static_cast<T*>(p.out) + row * p.head_dim;
  const float sum = high == -INFINITY ? 0.0f : std::exp(a - high) + std::exp(b - high);
  const float lse = sum == 0.0f ? high : high + std::log(sum);
  // An empty state contributes nothing, whatever its out holds.
  const Vec weight_a = Vec::fill(a == -INFINITY ? 0.0f : std::exp(a - lse));
  const Vec weight_b = Vec::fill(b == -INFINITY ? 0.0f : std::exp(b - lse));
  for (int x = 0; x < p.head_dim; x += Vec::kWidth) {
    Vec y = Vec::fill(0.0f);
    if (a != -INFINITY) y = Vec::fma(weight_a, Vec::load(out_a + x), y);
    if (b != -INFINITY) y = Vec::fma(weight_b, Vec::load(out_b + x), y);
    y.store(out + x);
  }
  p.lse[row] = lse;
}

}  // namespace

void merge_kernel_cpu(const MergeParams& p, const ParallelFor& parallel) {
  dispatch_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    parallel.run(p.rows, [&p](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) merge_row<T>(p, row);
    });
  });
}

}  // namespace zigzag::ZIGZAG_CPU_ISA
