// Softmax states and how they become one: over the warps of a block, and to the output. Over the blocks of a cluster:
// cluster.cuh.
// Every merge adds in a fixed order, so results are the same bits run to run.
#pragma once

#include "core/error.h"
#include "kernels/decode/keys.cuh"

namespace zigzag::attend {

inline constexpr float kLog2e = 1.44269504088896340736f;
inline constexpr float kLn2 = 0.69314718055994530942f;
inline constexpr float kEmptyMax = -3.4028234e38f;  // of an empty state: finite, so that differences are never NaN

// The units of BlockShape.
template <class S>
struct Units {
  static constexpr int kUsed = S::kBlock.used_units();
  static constexpr int kPerRow = S::kBlock.row_units();
  static_assert(kUsed == (S::kSteps + 1) / 2 && kUsed <= kPerRow && kUsed > 1);
};

// What both decode kernels are told.
struct Params : KeyParams {
  SharedLayout layout;
  int group;         // query heads per KV head
  int row_blocks;    // row blocks per KV head
  int team;          // blocks along grid.x that share a row group; 0: the runs of decode_full
  int cluster_log2;  // of a team that merges in clusters: a power of two up to kMaxCluster; else 0
  int spread;        // clusters of a team

  __host__ __device__ __forceinline__ int cluster() const { return 1 << cluster_log2; }
};

template <class S>
__device__ __forceinline__ bool in_cluster(const Params& p) {
  return cuda::kHasClusters && p.cluster_log2 > 0;
}

// A call without what few calls have: slack, rows or heads of a larger cache, padding, soft caps, sink logits. Its one
// new token, in clusters, has a kernel of its own, whose parameters are known to say so: a step of a ring is all
// latency, and what stands before its first load costs as much as the load (one ring of 64 + 256 on an H200: 0.12 us
// of 4.6).
inline bool is_bare(const AttentionParams& a) {
  return a.pad == nullptr && a.cache_rows.of == nullptr && a.heads.of == nullptr && a.sink_logits == nullptr &&
         a.softcap == 0.f && (a.window == 0 || a.slots == a.sink + a.window);
}

template <class S>
__device__ __forceinline__ Params bare_params(Params p) {
  __builtin_assume(static_cast<int>(blockIdx.z) >= 0 && static_cast<int>(blockIdx.y) >= 0);
  __builtin_assume(p.cluster_log2 > 0);
  p.pad = nullptr;
  p.cache_rows.of = nullptr, p.heads.of = nullptr;
  p.sink_logits = nullptr, p.softcap = 0.f;
  p.length_first = false;
  if (S::kRing) p.slots = p.sink + p.window;
  return p;
}

// Strides that the kernels may multiply in 32 bits.
inline void check_strides(const AttentionParams& a) {
  for (const int64_t stride : {a.k_cache_stride.token, a.v_cache_stride.token, a.q_stride.token, a.q_stride.head}) {
    ZZ_CHECK(stride >= 0 && stride < (int64_t{1} << 30),
             "token strides of the cache, token and head strides of q must be below 2^30 elements; got ", stride);
  }
}

// Work of a block without interruption: tiles of one row block of one (batch, KV head).
struct Segment {
  Keys keys;
  int row_block;
  int begin, end;  // tiles; with kSingle of all blocks of the team, which take them in turns
};

template <class S>
__device__ __forceinline__ int rows_of(const Params& p, const Segment& segment) {
  if (S::kSingle) return p.group;
  return min(S::kRows, p.group * p.q_len - segment.row_block * S::kRows);
}

// Query column and head within the group of a packed row. Columns from q_len on mark rows that do not exist.
struct Row {
  int column, head;
};

template <class S>
__device__ __forceinline__ Row unpack_row(const Params& p, const Segment& segment, int row) {
  if (S::kSingle) return {0, row};
  const int packed = segment.row_block * S::kRows + row;
  if (p.q_len == 1) return {packed < p.group ? 0 : 1, packed};
  return {packed / p.group, packed % p.group};
}

template <class S>
struct State {
  float out[S::kSteps][S::kRowTiles][4];  // O^T, not normalised
  float max[S::kRowTiles][2];             // running maximum of rows 2t, 2t + 1; the same in all lanes of equal t
  float sum[S::kRowTiles][2];             // this lane's share of the sum of exponentials

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int n = 0; n < S::kRowTiles; ++n) {
      max[n][0] = max[n][1] = kEmptyMax;
      sum[n][0] = sum[n][1] = 0.f;
#pragma unroll
      for (int step = 0; step < S::kSteps; ++step) {
        out[step][n][0] = out[step][n][1] = out[step][n][2] = out[step][n][3] = 0.f;
      }
    }
  }

  __device__ __forceinline__ void set_max(int n, int e, float m) { max[n][e] = m; }
};

// Adds up the sums of exponentials of the 8 lanes that share a row; all get the result.
template <class S>
__device__ __forceinline__ void join_sums(State<S>& state) {
#pragma unroll
  for (int n = 0; n < S::kRowTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
#pragma unroll
      for (int offset = 4; offset < 32; offset *= 2) {
        state.sum[n][e] += __shfl_xor_sync(0xffffffffu, state.sum[n][e], offset);
      }
    }
  }
}

// Partial result of one output row: 4 dims of the sum of exp2(logit - max) * v, and the norm it belongs to.
struct Partial {
  float4 out;
  float2 norm;  // {max, sum}
};

// What is left of a state's parts when its maximum rises, or gives way to a higher one: 2^difference of them. Over a
// quantised cache the sum of exponentials spans more than a float factor does (codes/segments.cuh): it takes half,
// twice.
template <bool kCodes>
struct Decay {
  float whole, half;

  __device__ __forceinline__ static Decay by(float difference) {
    const float half = cuda::exp2_approx(kCodes ? 0.5f * difference : difference);
    return {kCodes ? half * half : half, half};
  }
  __device__ __forceinline__ float of_sum(float sum) const { return kCodes ? sum * half * half : sum * whole; }
};

// Merge of `count` partial results: at(i) gives the i-th 4 dims, norm(i) its {max, sum}. kBatch at a time, whose loads
// are under way together.
template <bool kCodes, int kBatch, class At, class Norm>
__device__ __forceinline__ Partial merge_partials(int count, const At& at, const Norm& norm) {
  Partial merged = {make_float4(0.f, 0.f, 0.f, 0.f), make_float2(kEmptyMax, 0.f)};
#pragma unroll 1
  for (int base = 0; base < count; base += kBatch) {
    float2 norms[kBatch];
    float4 outs[kBatch];
    float high = merged.norm.x;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int index = min(base + i, count - 1);
      norms[i] = norm(index);
      outs[i] = at(index);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) high = fmaxf(high, norms[i].x);
    const auto decay = Decay<kCodes>::by(merged.norm.x - high);
    merged.norm = make_float2(high, decay.of_sum(merged.norm.y));
    const float factor = decay.whole;
    merged.out =
        make_float4(merged.out.x * factor, merged.out.y * factor, merged.out.z * factor, merged.out.w * factor);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const auto part = Decay<kCodes>::by(base + i < count ? norms[i].x - high : -INFINITY);
      const float weight = part.whole;
      merged.norm.y += part.of_sum(norms[i].y);
      merged.out.x += weight * outs[i].x;
      merged.out.y += weight * outs[i].y;
      merged.out.z += weight * outs[i].z;
      merged.out.w += weight * outs[i].w;
    }
  }
  return merged;
}

// ---- within a block ----

extern __shared__ __align__(128) char shared_memory[];

// Writes the calling warp's state to shared memory. The row stride of kHeadDim + 4 floats keeps the 32 lanes on 32
// banks.
template <class S>
__device__ __forceinline__ void store_partial(const SharedLayout& layout, State<S>& state, int rows) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  float* out = reinterpret_cast<float*>(shared_memory + layout.partial) + warp * S::kRows * (S::kHeadDim + 4);
  float2* norm = reinterpret_cast<float2*>(shared_memory + layout.norm) + warp * S::kRows;
  join_sums(state);
#pragma unroll
  for (int n = 0; n < S::kRowTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int row = 8 * n + 2 * t + e;
      if (row >= rows) continue;
      if (g == 0) norm[row] = make_float2(state.max[n][e], state.sum[n][e]);
#pragma unroll
      for (int step = 0; step < S::kSteps; ++step) {
        out[row * (S::kHeadDim + 4) + S::out_dim(step, g, 0)] = state.out[step][n][e];
        out[row * (S::kHeadDim + 4) + S::out_dim(step, g, 1)] = state.out[step][n][e + 2];
      }
    }
  }
}

template <class S>
__device__ __forceinline__ float2 warp_norm(const SharedLayout& layout, int warp, int row) {
  return reinterpret_cast<const float2*>(shared_memory + layout.norm)[warp * S::kRows + row];
}

// Result of the block for 4 dims of a row.
template <class S>
__device__ __forceinline__ Partial merge_warps(const SharedLayout& layout, int row, int quad) {
  const float4* out = reinterpret_cast<const float4*>(shared_memory + layout.partial);
  constexpr int kStride = (S::kHeadDim + 4) / 4;
  return merge_partials<S::kCodes, kMaxWarps>(
      blockDim.x / 32, [&](int warp) { return out[(warp * S::kRows + row) * kStride + quad]; },
      [&](int warp) { return warp_norm<S>(layout, warp, row); });
}

// ---- output ----

// Where a row of the output goes.
struct OutputRow {
  char* out;
  float* lse;
  int head;      // of the layer's query heads
  bool padding;  // of the chunk: its result is empty
};

// {max, sum} with the sink logit of the head in it, if there is one; what the sum of values is multiplied by.
struct Normalizer {
  float2 norm;
  float factor;
};

template <class S>
__device__ __forceinline__ Normalizer normalizer(const Params& p, float2 norm, int head) {
  if (p.sink_logits == nullptr) return {norm, cuda::reciprocal_approx(norm.y)};
  const float logit = kLog2e * __ldg(p.sink_logits + head), high = fmaxf(norm.x, logit);
  const auto decay = Decay<S::kCodes>::by(norm.x - high);
  norm = make_float2(high, decay.of_sum(norm.y) + cuda::exp2_approx(logit - high));
  return {norm, decay.whole * cuda::reciprocal_approx(norm.y)};
}

template <class S>
__device__ __forceinline__ OutputRow output_row(const Params& p, const Segment& segment, int row) {
  const auto [column, group_head] = unpack_row<S>(p, segment, row);
  const int batch = segment.keys.batch, head = segment.keys.head * p.group + group_head;
  const int64_t offset = batch * p.out_stride.batch + head * p.out_stride.head + column * p.out_stride.token;
  const int before = S::kCodes ? p.columns_before : 0, after = S::kCodes ? p.columns_after : 0;
  const int64_t row_index =
      (static_cast<int64_t>(batch) * p.lse_heads(p.group) + head) * (before + p.q_len + after) + before + column;
  return {static_cast<char*>(p.out) + 2 * offset, p.lse + row_index, head, column < segment.keys.first};
}

__device__ __forceinline__ float log_sum_exp(float2 norm) { return kLn2 * (norm.x + cuda::log2_approx(norm.y)); }

// Normalises and stores 4 dims of a row; the thread of the first 4 also stores the row's log-sum-exp.
template <class S>
__device__ __forceinline__ void write_result(const Params& p, const Segment& segment, int row, int quad,
                                             const Partial& result) {
  using Element = typename S::Element;
  const OutputRow target = output_row<S>(p, segment, row);
  const bool empty = result.norm.y == 0.f || target.padding;
  const auto [norm, scale] = normalizer<S>(p, result.norm, target.head);
  const float factor = empty ? 0.f : scale;
  const float4 out = empty ? make_float4(0.f, 0.f, 0.f, 0.f) : result.out;
  *reinterpret_cast<uint2*>(target.out + 8 * quad) = make_uint2(cuda::pack2<Element>(out.x * factor, out.y * factor),
                                                                cuda::pack2<Element>(out.z * factor, out.w * factor));
  if (quad == 0) *target.lse = empty ? -INFINITY : log_sum_exp(norm);
}

// Brings the states of the block's warps together in shared memory.
template <class S>
__device__ __forceinline__ void gather_in_block(const Params& p, const Segment& segment, State<S>& state) {
  __syncthreads();  // nobody reads the partial states of the previous segment any more
  store_partial<S>(p.layout, state, rows_of<S>(p, segment));
  __syncthreads();
}

// The block holds the whole result.
template <class S>
__device__ __forceinline__ void finish_in_block(const Params& p, const Segment& segment, State<S>& state) {
  gather_in_block<S>(p, segment, state);
  const int rows = rows_of<S>(p, segment);
  for (int i = threadIdx.x; i < rows * S::kQuads; i += blockDim.x) {
    const int row = i / S::kQuads, quad = i % S::kQuads;
    write_result<S>(p, segment, row, quad, merge_warps<S>(p.layout, row, quad));
  }
}

}  // namespace zigzag::attend
