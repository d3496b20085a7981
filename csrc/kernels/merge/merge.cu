// Merge of two partial attention states on CUDA: memory bound, 16 bytes of each state per thread.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>

#include "cuda/launch.h"
#include "kernels/merge/merge.h"

namespace zigzag {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ float2 to_float2(__half2 x) { return __half22float2(x); }
__device__ __forceinline__ float2 to_float2(__nv_bfloat162 x) { return __bfloat1622float2(x); }
__device__ __forceinline__ void from_float2(__half2& x, float2 value) { x = __float22half2_rn(value); }
__device__ __forceinline__ void from_float2(__nv_bfloat162& x, float2 value) { x = __float22bfloat162_rn(value); }

template <class Pair>
struct alignas(16) Vec8 {
  Pair pair[4];
};

// Grid (rows); block (head_dim / 8, rows). Pair is the two-element vector of the dtype.
// A state of weight 0 is not read into the sum, so that what an empty state holds does not matter.
template <class Pair>
__global__ void __launch_bounds__(kThreads) merge_kernel(const __grid_constant__ MergeParams p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= p.rows) return;
  const float lse_a = p.lse_a[row], lse_b = p.lse_b[row];
  const float top = fmaxf(lse_a, lse_b);
  const float base = top == -INFINITY ? 0.0f : top;
  const float exp_a = expf(lse_a - base), exp_b = expf(lse_b - base);
  const float sum = exp_a + exp_b;
  const float weight_a = exp_a == 0.0f ? 0.0f : exp_a / sum, weight_b = exp_b == 0.0f ? 0.0f : exp_b / sum;

  const int64_t vec = row * blockDim.x + threadIdx.x;
  const Vec8<Pair> a = static_cast<const Vec8<Pair>*>(p.out_a)[vec];
  const Vec8<Pair> b = static_cast<const Vec8<Pair>*>(p.out_b)[vec];
  Vec8<Pair> out;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 x = to_float2(a.pair[i]), y = to_float2(b.pair[i]);
    const auto mix = [&](float from_a, float from_b) {
      return (weight_a == 0.0f ? 0.0f : weight_a * from_a) + (weight_b == 0.0f ? 0.0f : weight_b * from_b);
    };
    from_float2(out.pair[i], make_float2(mix(x.x, y.x), mix(x.y, y.y)));
  }
  static_cast<Vec8<Pair>*>(p.out)[vec] = out;
  if (threadIdx.x == 0) p.lse[row] = base + logf(sum);
}

}  // namespace

void merge_kernel_cuda(const MergeParams& p, void* stream) {
  const unsigned chunks = static_cast<unsigned>(p.head_dim) / 8;
  const unsigned rows = kThreads / chunks;
  cuda::LaunchConfig config;
  config.block = dim3(chunks, rows);
  config.grid = dim3(static_cast<unsigned>((p.rows + rows - 1) / rows));
  cuda::launch(p.dtype == DType::kFloat16 ? merge_kernel<__half2> : merge_kernel<__nv_bfloat162>, config, p, stream);
}

}  // namespace zigzag
