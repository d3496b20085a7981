// The merge of softmax states over the blocks of a cluster, through distributed shared memory, in a fixed order.
#pragma once

#include "kernels/decode/state.cuh"

namespace zigzag::attend {

// Sends the calling warp's state to the blocks that merge it: unit u of the output is merged by block u % cluster. The
// floats of a unit are ordered as the lanes hold them: S::out_dim() of two steps, both halves, for each g.
template <class S>
__device__ __forceinline__ void send_to_cluster(const Params& p, const State<S>& state, int rows) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int mask = p.cluster() - 1, sources = (blockDim.x / 32) << p.cluster_log2;
  const int source = cuda::cluster_rank() + (threadIdx.x / 32 << p.cluster_log2);
  const uint32_t base = cuda::shared_address(shared_memory);
  const uint32_t partial = base + p.layout.partial + g * 16, norm = base + p.layout.norm;
#pragma unroll
  for (int n = 0; n < S::kRowTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int row = 8 * n + 2 * t + e;
      if (row >= rows) continue;
      // Unit first + i: i lies within the low bits of kPerRow, which are zero in `first`.
      const int first = row * Units<S>::kPerRow, owner = first & mask;
      const int place = (first >> p.cluster_log2) * sources + source;
#pragma unroll
      for (int i = 0; i < Units<S>::kUsed; ++i) {
        const int step = 2 * i;
        const bool whole = step + 1 < S::kSteps;
        const float (&low)[4] = state.out[step][n], (&high)[4] = state.out[whole ? step + 1 : step][n];
        const uint32_t address = partial + place * 128 + (i >> p.cluster_log2) * sources * 128;
        cuda::cluster_store(cuda::cluster_address(address, owner + (i & mask)),
                            make_float4(low[e], low[e + 2], whole ? high[e] : 0.f, whole ? high[e + 2] : 0.f));
      }
      if (g < Units<S>::kUsed) {
        const uint32_t address = norm + place * 8 + (g >> p.cluster_log2) * sources * 8;
        cuda::cluster_store(cuda::cluster_address(address, owner + (g & mask)),
                            make_float2(state.max[n][e], state.sum[n][e]));
      }
    }
  }
}

// Merges a unit that has arrived from all sources: lane = 8 * slice + quad adds up 4 floats of every fourth source,
// then the slices are added up so that each lane has one float. A warp per unit.
template <class S>
__device__ __forceinline__ void merge_unit(const Params& p, int unit, const OutputRow& target) {
  using Element = typename S::Element;
  constexpr int kSets = kMaxWarps * (S::kRing ? kMaxRingCluster : kMaxCluster) / 32;  // of 32 sources, one a lane
  const int lane = threadIdx.x % 32, slice = lane / 8, quad = lane % 8;
  const int sources = (blockDim.x / 32) << p.cluster_log2;
  const int first = (unit >> p.cluster_log2) * sources;
  const float2* norms = reinterpret_cast<const float2*>(shared_memory + p.layout.norm) + first;
  const float4* parts = reinterpret_cast<const float4*>(shared_memory + p.layout.partial) + first * 8;

  float2 norm[kSets];
  float2 total = make_float2(kEmptyMax, 0.f);
#pragma unroll
  for (int i = 0; i < kSets; ++i) {
    norm[i] = lane + 32 * i < sources ? norms[lane + 32 * i] : make_float2(kEmptyMax, 0.f);
    total.x = fmaxf(total.x, norm[i].x);
  }
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    total.x = fmaxf(total.x, __shfl_xor_sync(0xffffffffu, total.x, offset));
  }
  float weight[kSets];
#pragma unroll
  for (int i = 0; i < kSets; ++i) {
    const auto part = Decay<S::kCodes>::by(lane + 32 * i < sources ? norm[i].x - total.x : -INFINITY);
    weight[i] = part.whole;
    total.y += part.of_sum(norm[i].y);
  }
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) total.y += __shfl_xor_sync(0xffffffffu, total.y, offset);

  float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 1
  for (int set = 0; set * 32 < sources; ++set) {
    const float4* mine = parts + (set * 32 + slice) * 8 + quad;
    const int rest = sources - set * 32 - slice;
    float set_weight = weight[0];
#pragma unroll
    for (int i = 1; i < kSets; ++i) set_weight = set == i ? weight[i] : set_weight;
#pragma unroll
    for (int i = 0; i < 32; i += 4) {  // all loads of a set are under way together
      const float w = __shfl_sync(0xffffffffu, set_weight, i + slice);
      const float4 part = i < rest ? mine[i * 8] : make_float4(0.f, 0.f, 0.f, 0.f);
      sum.x += w * part.x, sum.y += w * part.y, sum.z += w * part.z, sum.w += w * part.w;
    }
  }
  // Slices 0 and 1 keep the first two floats, 2 and 3 the others; then each keeps one.
  const bool upper = slice & 2, odd = slice & 1;
  float low = upper ? sum.z : sum.x, high = upper ? sum.w : sum.y;
  low += __shfl_xor_sync(0xffffffffu, upper ? sum.x : sum.z, 16);
  high += __shfl_xor_sync(0xffffffffu, upper ? sum.y : sum.w, 16);
  float out = odd ? high : low;
  out += __shfl_xor_sync(0xffffffffu, odd ? low : high, 8);

  const int dim = S::out_dim(unit % Units<S>::kPerRow * 2 + slice / 2, quad, slice % 2);
  const bool empty = total.y == 0.f || target.padding;
  if (dim < S::kHeadDim)
    reinterpret_cast<Element*>(target.out)[dim] = Element(empty ? 0.f : out * cuda::reciprocal_approx(total.y));
  if (dim == 0) *target.lse = empty ? -INFINITY : log_sum_exp(total);
}

// Every warp of the cluster holds a part of the result. cluster_arrive_relaxed() was called before: each thread's first
// act tells the others that its block runs, and may be written to.
template <class S>
__device__ __forceinline__ void finish_in_cluster(const Params& p, const Segment& segment, State<S>& state, bool more) {
  const int rows = rows_of<S>(p, segment);
  join_sums(state);
  __syncwarp();
  cuda::cluster_wait();  // the other blocks run, and have merged the previous segment
  send_to_cluster<S>(p, state, rows);
  __syncwarp();
  cuda::cluster_arrive();
  const int step = (blockDim.x / 32) << p.cluster_log2;
  int unit = cuda::cluster_rank() + (threadIdx.x / 32 << p.cluster_log2);
  OutputRow target = output_row<S>(p, segment, unit / Units<S>::kPerRow);  // hides behind the barrier
  cuda::cluster_wait();                                                    // everything has arrived
  while (unit < rows * Units<S>::kPerRow) {
    if (unit % Units<S>::kPerRow < Units<S>::kUsed) merge_unit<S>(p, unit, target);
    unit += step;
    target = output_row<S>(p, segment, unit / Units<S>::kPerRow);
  }
  if (more) {
    __syncwarp();
    cuda::cluster_arrive();
  }
}

}  // namespace zigzag::attend
