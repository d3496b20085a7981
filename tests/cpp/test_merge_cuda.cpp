// Merge of attention states on the GPU against double precision.
#if ZIGZAG_WITH_CUDA
#include <cmath>
#include <random>
#include <vector>

#include "cuda_testing.h"
#include "kernels/attention.h"

namespace zigzag {

TEST_CASE("merge of two states equals the double reference; an empty state does not matter") {
  if (no_device()) return;
  const float empty = -INFINITY;
  const std::vector<float> lse_a = {1.0f, empty, 3.0f, empty, -200.0f, 90.0f, 0.0f};
  const std::vector<float> lse_b = {1.5f, 2.0f, empty, empty, -201.0f, -90.0f, 0.0f};
  const int rows = static_cast<int>(lse_a.size());
  for (int head_dim : kHeadDims) {
    for (DType dtype : {DType::kBFloat16, DType::kFloat16}) {
      std::mt19937 random(3);
      std::normal_distribution<float> normal;
      std::vector<uint16_t> out_a(static_cast<size_t>(rows) * head_dim), out_b(out_a);
      for (size_t i = 0; i < out_a.size(); ++i) {
        const size_t row = i / head_dim;
        out_a[i] = lse_a[row] == empty ? 0xffff : encode(normal(random), dtype);
        out_b[i] = lse_b[row] == empty ? 0xffff : encode(normal(random), dtype);
      }
      const DeviceArray<uint16_t> a(out_a), b(out_b), out(std::vector<uint16_t>(out_a.size(), 0xffff));
      const DeviceArray<float> from_a(lse_a), from_b(lse_b), lse(std::vector<float>(rows, NAN));
      MergeParams p = {};
      p.out_a = a.data(), p.lse_a = from_a.data(), p.out_b = b.data(), p.lse_b = from_b.data();
      p.out = out.data(), p.lse = lse.data(), p.rows = rows, p.head_dim = head_dim, p.dtype = dtype;
      merge_states_cuda(p, nullptr);
      CHECK_CUDA(cudaDeviceSynchronize());
      const std::vector<uint16_t> actual = out.host();
      const std::vector<float> actual_lse = lse.host();
      for (int row = 0; row < rows; ++row) {
        const double top = std::max(lse_a[row], lse_b[row]);
        const bool nothing = std::isinf(top);
        const double expected = nothing ? top : top + std::log(std::exp(lse_a[row] - top) + std::exp(lse_b[row] - top));
        CHECK((nothing ? actual_lse[row] == empty
                       : std::abs(actual_lse[row] - expected) < 1e-5 * (1 + std::abs(expected))));
        const double weight_a = nothing ? 0 : std::exp(lse_a[row] - expected),
                     weight_b = nothing ? 0 : std::exp(lse_b[row] - expected);
        double worst = 0;
        for (int d = 0; d < head_dim; ++d) {
          const size_t i = static_cast<size_t>(row) * head_dim + d;
          const double x = (weight_a > 0 ? weight_a * decode(out_a[i], dtype) : 0) +
                           (weight_b > 0 ? weight_b * decode(out_b[i], dtype) : 0);
          const double error = std::abs(decode(actual[i], dtype) - x) / (1 + std::abs(x));
          if (!(error <= worst)) worst = error;
        }
        CHECK(worst <= (dtype == DType::kBFloat16 ? 4e-3 : 6e-4));
      }
    }
  }
}

}  // namespace zigzag
#endif
