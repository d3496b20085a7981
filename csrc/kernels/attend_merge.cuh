// Softmax states and how they become one: over the warps of a block, over the blocks of a cluster, and to the output.
// Every merge adds in a fixed order, so results are the same bits run to run.
#pragma once

#include "kernels/attend_keys.cuh"

namespace zigzag::attend {

inline constexpr int kMaxWarps = 8;
inline constexpr float kLog2e = 1.44269504088896340736f;
inline constexpr float kLn2 = 0.69314718055994530942f;
inline constexpr float kEmptyMax =
    -3.4028234e38f;  // maximum of an empty state: finite, so that differences are never NaN

// Byte offsets in dynamic shared memory; the staged queries are at 0.
struct SharedLayout {
  int stages;        // stages of a warp's ring that exist: fewer than kStages where a warp never has more tiles
  int ring;          // [warps][stages] K tile, V tile
  int partial;       // [warps][kRows][kHeadDim + 4] fp32: O of each warp
  int partial_norm;  // [warps][kRows] {max, sum}
  int inbox;         // [cluster][share of the output] float4: partial results that other blocks of the cluster send
  int inbox_norm;    // [cluster][kRows] {max, sum}
  int total;
};

template <class S>
constexpr SharedLayout shared_layout(int warps, int tiles_per_warp, int query_buffers, int cluster) {
  SharedLayout layout = {};
  layout.stages = tiles_per_warp < S::kStages ? tiles_per_warp : S::kStages;
  layout.ring = query_buffers * S::kRows * S::kRowBytes;
  layout.partial = layout.ring + warps * layout.stages * S::kStageBytes;
  layout.partial_norm = layout.partial + warps * S::kRows * (S::kHeadDim + 4) * 4;
  layout.inbox = layout.partial_norm + warps * S::kRows * 8;
  const int inbox_items = cluster > 1 ? (S::kRows * S::kQuads + cluster - 1) / cluster * cluster : 0;
  layout.inbox_norm = layout.inbox + inbox_items * 16;
  layout.total = layout.inbox_norm + (cluster > 1 ? cluster * S::kRows * 8 : 0);
  return layout;
}

// What both decode kernels are told.
struct Params : AttentionParams {
  SharedLayout layout;
  int group;         // query heads per KV head
  int row_blocks;    // row blocks per KV head
  int cluster_log2;  // the blocks that merge as a cluster: 1, 2, 4 or 8
  bool keys_first;   // load keys before waiting for the kernel in front: see run_segments

  __host__ __device__ __forceinline__ int cluster() const { return 1 << cluster_log2; }
};

// Work of a block without interruption: a run of tiles of one row block of one (batch, KV head).
struct Segment {
  Keys keys;
  int row_block;
  int begin, end;  // tiles
};

template <class S>
__device__ __forceinline__ int rows_of(const Params& p, const Segment& segment) {
  return min(S::kRows, p.group * p.q_len - segment.row_block * S::kRows);
}

// Query column and head within the group of a packed row. Columns from q_len on mark rows that do not exist.
struct Row {
  int column, head;
};

__device__ __forceinline__ Row unpack_row(const Params& p, int packed) {
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
};

// Partial result of one output row: 4 dims of the sum of exp2(logit - max) * v, and the norm it belongs to.
struct Partial {
  float4 out;
  float2 norm;  // {max, sum}
};

// Merge of `count` partial results: at(i) gives the i-th 4 dims, norm(i) its {max, sum}. Eight at a time, so that their
// loads are under way together.
template <class At, class Norm>
__device__ __forceinline__ Partial merge_partials(int count, const At& at, const Norm& norm) {
  constexpr int kBatch = 8;
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
    const float factor = device::exp2_approx(merged.norm.x - high);
    merged.norm = make_float2(high, merged.norm.y * factor);
    merged.out =
        make_float4(merged.out.x * factor, merged.out.y * factor, merged.out.z * factor, merged.out.w * factor);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const float weight = base + i < count ? device::exp2_approx(norms[i].x - high) : 0.f;
      merged.norm.y += weight * norms[i].y;
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
__device__ __forceinline__ void store_partial(const SharedLayout& layout, const State<S>& state, int rows) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  float* out = reinterpret_cast<float*>(shared_memory + layout.partial) + warp * S::kRows * (S::kHeadDim + 4);
  float2* norm = reinterpret_cast<float2*>(shared_memory + layout.partial_norm) + warp * S::kRows;
#pragma unroll
  for (int n = 0; n < S::kRowTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int row = 8 * n + 2 * t + e;
      float sum = state.sum[n][e];
#pragma unroll
      for (int offset = 4; offset < 32; offset *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
      if (row >= rows) continue;
      if (g == 0) norm[row] = make_float2(state.max[n][e], sum);
#pragma unroll
      for (int step = 0; step < S::kSteps; ++step) {
        out[row * (S::kHeadDim + 4) + step * 16 + g] = state.out[step][n][e];
        out[row * (S::kHeadDim + 4) + step * 16 + g + 8] = state.out[step][n][e + 2];
      }
    }
  }
}

template <class S>
__device__ __forceinline__ float2 warp_norm(const SharedLayout& layout, int warp, int row) {
  return reinterpret_cast<const float2*>(shared_memory + layout.partial_norm)[warp * S::kRows + row];
}

// Result of the block for 4 dims of a row.
template <class S>
__device__ __forceinline__ Partial merge_warps(const SharedLayout& layout, int row, int quad) {
  const float4* out = reinterpret_cast<const float4*>(shared_memory + layout.partial);
  constexpr int kStride = (S::kHeadDim + 4) / 4;
  return merge_partials(
      blockDim.x / 32, [&](int warp) { return out[(warp * S::kRows + row) * kStride + quad]; },
      [&](int warp) { return warp_norm<S>(layout, warp, row); });
}

template <class S>
__device__ __forceinline__ float2 merge_warp_norms(const SharedLayout& layout, int row) {
  return merge_partials(
             blockDim.x / 32, [](int) { return make_float4(0.f, 0.f, 0.f, 0.f); },
             [&](int warp) { return warp_norm<S>(layout, warp, row); })
      .norm;
}

// ---- output ----

// Normalises and stores 4 dims of a row; the thread of the first 4 also stores the row's log-sum-exp.
template <class S>
__device__ __forceinline__ void write_result(const Params& p, const Segment& segment, int row, int quad,
                                             const Partial& result) {
  using Element = typename S::Element;
  const auto [column, group_head] = unpack_row(p, segment.row_block * S::kRows + row);
  const int head = segment.keys.kv_head * p.group + group_head;
  const bool empty = result.norm.y == 0.f || column < segment.keys.first;
  const float factor = empty ? 0.f : 1.f / result.norm.y;
  const float4 out = empty ? make_float4(0.f, 0.f, 0.f, 0.f) : result.out;
  const int64_t offset =
      segment.keys.batch * p.out_stride.batch + head * p.out_stride.head + column * p.out_stride.token;
  *reinterpret_cast<uint2*>(static_cast<char*>(p.out) + 2 * (offset + quad * 4)) = make_uint2(
      device::pack2<Element>(out.x * factor, out.y * factor), device::pack2<Element>(out.z * factor, out.w * factor));
  if (quad != 0) return;
  const int64_t row_index = (static_cast<int64_t>(segment.keys.batch) * p.num_q_heads + head) * p.q_len + column;
  p.lse[row_index] = empty ? -INFINITY : kLn2 * (result.norm.x + log2f(result.norm.y));
}

// The block holds the whole result.
template <class S>
__device__ __forceinline__ void finish_in_block(const Params& p, const Segment& segment) {
  const int rows = rows_of<S>(p, segment);
  for (int i = threadIdx.x; i < rows * S::kQuads; i += blockDim.x) {
    const int row = i / S::kQuads, quad = i % S::kQuads;
    write_result<S>(p, segment, row, quad, merge_warps<S>(p.layout, row, quad));
  }
}

// Every block of the cluster holds a part of the result. Block r collects the r-th share of the output from the inboxes
// that all blocks fill through distributed shared memory. The caller has arrived at the cluster barrier once before.
template <class S>
__device__ __forceinline__ void finish_in_cluster(const Params& p, const Segment& segment, bool more) {
  const int rows = rows_of<S>(p, segment);
  const int rank = device::cluster_rank();
  const int cluster = p.cluster(), items = rows * S::kQuads;
  const int share = (items + cluster - 1) >> p.cluster_log2;
  const uint32_t inbox = device::shared_address(shared_memory) + p.layout.inbox;
  const uint32_t inbox_norm = device::shared_address(shared_memory) + p.layout.inbox_norm;

  __syncwarp();
  device::cluster_wait();  // the other blocks run, and have emptied their inboxes of the previous segment
  for (int i = threadIdx.x; i < items; i += blockDim.x) {
    const Partial part = merge_warps<S>(p.layout, i / S::kQuads, i % S::kQuads);
    const int owner = i / share;
    device::cluster_store(device::cluster_address(inbox + (rank * share + i - owner * share) * 16, owner), part.out);
  }
  // From the last thread on: where there are fewer items than threads, the last warp has nothing else to do.
  for (int i = blockDim.x - 1 - threadIdx.x; i < rows * cluster; i += blockDim.x) {
    const int row = i >> p.cluster_log2;
    const float2 norm = merge_warp_norms<S>(p.layout, row);
    device::cluster_store(device::cluster_address(inbox_norm + (rank * S::kRows + row) * 8, i & (cluster - 1)), norm);
  }
  __syncwarp();
  device::cluster_arrive();
  device::cluster_wait();  // all inboxes are full

  const float4* out = reinterpret_cast<const float4*>(shared_memory + p.layout.inbox);
  const float2* norm = reinterpret_cast<const float2*>(shared_memory + p.layout.inbox_norm);
  for (int i = threadIdx.x; i < share && rank * share + i < items; i += blockDim.x) {
    const int row = (rank * share + i) / S::kQuads, quad = (rank * share + i) % S::kQuads;
    write_result<S>(p, segment, row, quad,
                    merge_partials(
                        cluster, [&](int block) { return out[block * share + i]; },
                        [&](int block) { return norm[block * S::kRows + row]; }));
  }
  if (more) {
    __syncwarp();
    device::cluster_arrive();
  }
}

}  // namespace zigzag::attend
