// The merge of softmax states over the blocks of a cluster, through distributed shared memory, and over several
// clusters of a team, through the workspace; both in a fixed order.
#pragma once

#include "kernels/decode/full/workspace.h"
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
#pragma unroll
      for (int i = 0; i < Units<S>::kUsed; i += 8) {
        const int unit = i + g;
        if (unit >= Units<S>::kUsed) continue;
        const uint32_t address = norm + place * 8 + (unit >> p.cluster_log2) * sources * 8;
        cuda::cluster_store(cuda::cluster_address(address, owner + (unit & mask)),
                            make_float2(state.max[n][e], state.sum[n][e]));
      }
    }
  }
}

// What a lane of a warp has of a merged unit: one of its 32 floats, and the norm it belongs to.
struct UnitPart {
  float out;
  float2 norm;  // {max, sum}
};

// Merges a unit that has arrived from all sources: lane = 8 * slice + quad adds up 4 floats of every fourth source,
// then the slices are added up so that each lane has one float. A warp per unit.
template <class S>
__device__ __forceinline__ UnitPart merge_unit(const Params& p, int unit) {
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
  return {out, total};
}

// Normalises and stores a unit.
template <class S>
__device__ __forceinline__ void write_unit(const Params& p, int unit, const OutputRow& target, const UnitPart& part) {
  using Element = typename S::Element;
  const int lane = threadIdx.x % 32, slice = lane / 8, quad = lane % 8;
  const int dim = S::out_dim(unit % Units<S>::kPerRow * 2 + slice / 2, quad, slice % 2);
  const bool empty = part.norm.y == 0.f || target.padding;
  const auto [norm, factor] = normalizer<S>(p, part.norm, target.head);
  if (dim < S::kHeadDim) reinterpret_cast<Element*>(target.out)[dim] = Element(empty ? 0.f : part.out * factor);
  if (dim == 0) *target.lse = empty ? -INFINITY : log_sum_exp(norm);
}

// Where the clusters of a team leave what they have of a unit, in the workspace: [row groups][units][spread] of 32
// floats each, then as many norms.
template <class S>
struct TeamUnits {
  static constexpr int kUnits = S::kRows * Units<S>::kPerRow;
  float* out;
  float2* norm;
  int spread;

  __device__ __forceinline__ explicit TeamUnits(const Params& p) : spread(p.spread) {
    const int group = blockIdx.z * gridDim.y + blockIdx.y, groups = gridDim.y * gridDim.z;
    float* base = reinterpret_cast<float*>(static_cast<char*>(p.workspace) + decode_full::kCounterBytes);
    out = base + group * kUnits * spread * 32;
    norm = reinterpret_cast<float2*>(base + groups * kUnits * spread * 32) + group * kUnits * spread;
  }

  __device__ __forceinline__ void store(int unit, int cluster, const UnitPart& part) const {
    const int at = unit * spread + cluster, lane = threadIdx.x % 32;
    __stcg(out + at * 32 + lane, part.out);
    if (lane == 0) __stcg(norm + at, part.norm);
  }

  // The sum of what all clusters have stored. kBatch loads are under way together.
  __device__ __forceinline__ UnitPart merge(int unit) const {
    constexpr int kBatch = 8;
    const int at = unit * spread, lane = threadIdx.x % 32;
    const float2 mine = lane < spread ? __ldcg(norm + at + lane) : make_float2(kEmptyMax, 0.f);
    UnitPart whole = {0.f, mine};
    float weight = 0.f;
#pragma unroll 1
    for (int base = 0; base < spread; base += kBatch) {
      float part[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) part[i] = __ldcg(out + (at + min(base + i, spread - 1)) * 32 + lane);
      if (base == 0) {  // while they are under way
#pragma unroll
        for (int offset = 1; offset < kMaxSpread; offset *= 2) {
          whole.norm.x = fmaxf(whole.norm.x, __shfl_xor_sync(0xffffffffu, whole.norm.x, offset));
        }
        const auto decay = Decay<S::kCodes>::by(lane < spread ? mine.x - whole.norm.x : -INFINITY);
        weight = decay.whole;
        whole.norm.y = decay.of_sum(mine.y);
#pragma unroll
        for (int offset = 1; offset < kMaxSpread; offset *= 2) {
          whole.norm.y += __shfl_xor_sync(0xffffffffu, whole.norm.y, offset);
        }
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const float w = __shfl_sync(0xffffffffu, weight, min(base + i, 31));
        if (base + i < spread) whole.out += w * part[i];
      }
    }
    // Lanes from kMaxSpread on have reduced among themselves.
    whole.norm.x = __shfl_sync(0xffffffffu, whole.norm.x, 0), whole.norm.y = __shfl_sync(0xffffffffu, whole.norm.y, 0);
    return whole;
  }
};

// Makes one result of what the clusters of a team have. Warp w of rank r has the same units in each of them, and that
// of the cluster which comes last merges them: nobody waits, and no block reads more than its share.
template <class S>
__device__ __forceinline__ void merge_clusters(const Params& p, const Segment& segment, int first, int step,
                                               int units) {
  if (first >= units) return;
  const TeamUnits<S> team(p);
  for (int unit = first; unit < units; unit += step) {
    if (unit % Units<S>::kPerRow >= Units<S>::kUsed) continue;
    team.store(unit, blockIdx.x >> p.cluster_log2, merge_unit<S>(p, unit));
  }
  __syncwarp();
  unsigned before = 0;
  if (threadIdx.x % 32 == 0) {  // its release covers what the barrier has shown it of the other lanes' writes
    const int block = ((blockIdx.z * gridDim.y + blockIdx.y) << p.cluster_log2) + cuda::cluster_rank();
    unsigned* counter = static_cast<unsigned*>(p.workspace) + block * kMaxWarps + threadIdx.x / 32;
    before = cuda::atomic_inc_acq_rel(counter, p.spread - 1);
  }
  before = __shfl_sync(0xffffffffu, before, 0);
  if (before != static_cast<unsigned>(p.spread - 1)) return;
  __syncwarp();
  for (int unit = first; unit < units; unit += step) {
    if (unit % Units<S>::kPerRow >= Units<S>::kUsed) continue;
    write_unit<S>(p, unit, output_row<S>(p, segment, unit / Units<S>::kPerRow), team.merge(unit));
  }
}

// Every warp of the cluster holds a part of the result. Where several clusters share it there is no more to come.
// cluster_arrive_relaxed() was called before: each thread's first act tells the others that its block runs, and may be
// written to.
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
  if (!S::kRing && p.spread > 1) return merge_clusters<S>(p, segment, unit, step, rows * Units<S>::kPerRow);
  while (unit < rows * Units<S>::kPerRow) {
    if (unit % Units<S>::kPerRow < Units<S>::kUsed) write_unit<S>(p, unit, target, merge_unit<S>(p, unit));
    unit += step;
    target = output_row<S>(p, segment, unit / Units<S>::kPerRow);
  }
  if (more) {
    __syncwarp();
    cuda::cluster_arrive();
  }
}

}  // namespace zigzag::attend
