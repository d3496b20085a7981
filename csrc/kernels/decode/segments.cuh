// The math core of both decode kernels: flash attention of a few query rows over a long key list, on tensor cores.
//
// Operands are swapped: S^T = K Q^T and O^T = V^T P^T with mma.m16n8k16, so that a warp step takes 16 keys and the 8
// columns of the mma hold query rows: nothing is padded to 16 or 64 rows. Every warp streams its own tiles through its
// own ring of shared memory stages (cp.async) and keeps its own softmax state; warps meet when a segment ends, and
// where codes are appended before they are read. Logits are in base 2.
//
// Fragments, lane = 4 * g + t: a lane holds of S^T and P^T keys g, g + 8 x rows 2t, 2t + 1, and of O^T dims g, g + 8 x
// rows 2t, 2t + 1.
#pragma once

#include "cuda/softcap.cuh"
#include "kernels/attention.h"
#include "kernels/decode/cluster.cuh"
#include "kernels/decode/keys.cuh"
#include "kernels/decode/new_tokens.cuh"
#include "kernels/decode/queries.cuh"
#include "kernels/decode/state.cuh"

namespace zigzag::attend {

// ---- the warp step ----

// Raises the running maxima to cover the logits `s` and rescales what was summed before, if this is not the first tile.
// Most tiles raise none.
template <class S, class AnyState>
__device__ __forceinline__ void raise_max(AnyState& state, const float (&s)[S::kRowTiles][4], bool first) {
  bool raised = false;
  float high[S::kRowTiles][2];
#pragma unroll
  for (int n = 0; n < S::kRowTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      high[n][e] = fmaxf(s[n][e], s[n][e + 2]);
      raised |= high[n][e] > state.max[n][e];
    }
  }
  if (!first && !__any_sync(0xffffffffu, raised)) return;
  Decay<S::kCodes> decay[S::kRowTiles][2];
#pragma unroll
  for (int n = 0; n < S::kRowTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float m = fmaxf(high[n][e], state.max[n][e]);
#pragma unroll
      for (int offset = 4; offset < 32; offset *= 2) m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, offset));
      decay[n][e] = Decay<S::kCodes>::by(state.max[n][e] - m);
      state.set_max(n, e, m);
    }
  }
  if (first) return;
#pragma unroll
  for (int n = 0; n < S::kRowTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      state.sum[n][e] = decay[n][e].of_sum(state.sum[n][e]);
#pragma unroll
      for (int step = 0; step < S::kSteps; ++step) {
        state.out[step][n][e] *= decay[n][e].whole;
        state.out[step][n][e + 2] *= decay[n][e].whole;
      }
    }
  }
}

// Adds the 16 keys of a stage to the state. mask(s) sets the logits of keys a row must not see to -inf.
template <class S, class Mask>
__device__ __forceinline__ void attend_tile(State<S>& state, const Queries<S>& queries, uint32_t stage,
                                            float scale_log2, bool first, const Mask& mask) {
  using Element = typename S::Element;
  const int lane = threadIdx.x % 32;
  const uint32_t k_address = stage + swizzled(lane % 16, lane / 16, S::kRowBytes);
  const uint32_t v_address = stage + S::kTileBytes + swizzled(lane % 8 + lane / 16 * 8, lane / 8 % 2, S::kRowBytes);

  // One row tile is one chain of dependent mma: two accumulators halve its latency.
  constexpr int kChains = S::kRowTiles == 1 ? 2 : 1;
  float chain[kChains][S::kRowTiles][4] = {};
#pragma unroll
  for (int step = 0; step < S::kSteps; ++step) {
    uint32_t k[4], b[S::kRowTiles][2];
    cuda::ldmatrix_x4(k, advance_chunks(k_address, 2 * step));
    queries.get(step, b);
#pragma unroll
    for (int n = 0; n < S::kRowTiles; ++n) cuda::mma_m16n8k16<Element>(chain[step % kChains][n], k, b[n][0], b[n][1]);
  }
  float s[S::kRowTiles][4];
#pragma unroll
  for (int n = 0; n < S::kRowTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      s[n][i] = scale_log2 * (kChains == 2 ? chain[0][n][i] + chain[kChains - 1][n][i] : chain[0][n][i]);
    }
  }
  mask(s);
  raise_max<S>(state, s, first);

  uint32_t weights[S::kRowTiles][2];  // B fragments of P^T
#pragma unroll
  for (int n = 0; n < S::kRowTiles; ++n) {
    float e[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) e[i] = cuda::exp2_approx(s[n][i] - state.max[n][i % 2]);
    state.sum[n][0] += e[0] + e[2];
    state.sum[n][1] += e[1] + e[3];
    weights[n][0] = cuda::movmatrix_trans(cuda::pack2<Element>(e[0], e[1]));
    weights[n][1] = cuda::movmatrix_trans(cuda::pack2<Element>(e[2], e[3]));
  }
#pragma unroll
  for (int step = 0; step < S::kSteps; ++step) {
    uint32_t v[4];
    cuda::ldmatrix_x4_trans(v, advance_chunks(v_address, 2 * step));
#pragma unroll
    for (int n = 0; n < S::kRowTiles; ++n)
      cuda::mma_m16n8k16<Element>(state.out[step][n], v, weights[n][0], weights[n][1]);
  }
}

// ---- the block's loop over segments ----

// The new tokens whose slots lie in the segment, of a full cache: its block appends them. They are asked for before the
// tiles: behind those, which saturate the memory, they would take longer than the tiles themselves.
template <class S>
struct SegmentTokens {
  NewTokens<S> tokens;
  bool any = false;

  __device__ __forceinline__ void load(const Params& p, const Segment& segment) {
    if constexpr (S::kRing || S::kSingle) return;
    const Keys& keys = segment.keys;
    const int from = max(0, segment.begin * kTileKeys - keys.length);
    const int until = min(keys.fresh, segment.end * kTileKeys - keys.length);
    any = from < until;
    if (!any) return;
    cuda::grid_dependency_wait();
    tokens.load(p, keys, from, until, S::kCodes ? threadIdx.x / 32 : threadIdx.x);
  }
  __device__ __forceinline__ void append(const Params& p, const Segment& segment) {
    if (any) tokens.append(p, segment.keys, S::kCodes ? blockDim.x / 32 : blockDim.x);
  }
};

// Runs a job: a sequence of segments with a result each, of which the first is given. Job:
//   void settle(Segment&)                  kSingle: the first loads are under way, now the length may be asked for
//   bool next(Segment&)                    moves to the segment after this one; false where there is none
//   void finish(const Segment&, State&, bool more)
// The first loads of the next segment are under way before the previous one is finished.
//
// With programmatic dependent launch a block that appends nothing loads its first tile before the wait for the kernel
// in front, which therefore must not be the one that writes the cache or the lengths.
template <class S, class Job>
__device__ __forceinline__ void run_segments(const Params& p, Segment segment, Job& job) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const uint32_t base = cuda::shared_address(shared_memory);
  const uint32_t query_buffer = base + warp * S::kRows * S::kRowBytes;
  const uint32_t ring = base + p.layout.ring + warp * p.layout.stages * S::kStageBytes;
  const float scale_log2 = p.scale * kLog2e;
  // This warp's tiles: begin + offset, then every step-th.
  const int offset = S::kSingle ? warp * p.team : warp, step = S::kSingle ? warps * p.team : warps;

  const bool rotate = turning_pairs(p) > 0;
  NewToken<S> new_token;
  // One cp.async group a tile. What else is needed is asked for with or before the first tile: behind the others it
  // would wait for the whole GPU's. (Alone in front of the first tile the queries would hold it up.)
  const auto fill = [&] {
    SegmentTokens<S> appended;
    appended.load(p, segment);
    int item = segment.begin + offset;
    const bool early = item < segment.end;
    if (early) load_tile<S>(p, segment.keys, item, ring);
    cuda::grid_dependency_wait();
    cuda::grid_dependency_launch();
    RotatedQueries<S> rotated;
    if (!rotate) {
      stage_queries<S>(p, segment, query_buffer);
    } else if constexpr (S::kSingle) {
      rotated.load(p, segment, 0);
    } else {
      rotated.load_and_store(p, segment, shared_memory + (query_buffer - base));
    }
    constexpr bool kMayBeLate = S::kSingle && !S::kRing;  // the first tile lies past what may be read ahead
    if (!kMayBeLate) cuda::cp_async_commit();
    if (in_place<S>(p)) new_token.load(p, segment.keys);
    if constexpr (S::kSingle) job.settle(segment);
    if (kMayBeLate) {
      if (!early && item < segment.end) load_tile<S>(p, segment.keys, item, ring);
      cuda::cp_async_commit();
    }
#pragma unroll
    for (int i = 1; i < S::kStages; ++i) {
      item += step;
      if (item < segment.end) load_tile<S>(p, segment.keys, item, ring + i * S::kStageBytes);
      cuda::cp_async_commit();
    }
    if (rotate) {
      if (S::kSingle) rotated.store(p, segment, 0, shared_memory + (query_buffer - base));
      if (in_place<S>(p)) new_token.rotate(p, rotated.turn[0]);
    }
    appended.append(p, segment);
  };

  fill();
  for (bool more = true; more;) {
    State<S> state;
    state.clear();
    Queries<S> queries;
    cuda::cp_async_wait<S::kStages - 1>();
    __syncwarp();
    queries.attach(query_buffer);
    int query_position[S::kRowTiles][2];
    if constexpr (!S::kSingle) {
#pragma unroll
      for (int n = 0; n < S::kRowTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int column = unpack_row<S>(p, segment, 8 * n + 2 * (lane % 4) + e).column;
          query_position[n][e] = segment.keys.length + column - segment.keys.first;
        }
      }
    }

    uint32_t stage = ring;
    const uint32_t ring_end = ring + S::kStages * S::kStageBytes;
    for (int item = segment.begin + offset; item < segment.end; item += step) {
      const int key = item * kTileKeys + lane / 4;  // this lane's first key; the other is 8 further
      const bool masked = (item + 1) * kTileKeys > segment.keys.unmasked;
      // What the mask needs is calculated while the tile is on its way.
      unsigned vacant = 0;
      if constexpr (S::kRing || S::kSingle) vacant = masked ? vacant_rows<S>(p, segment.keys, item) : 0;
      int position[2] = {-1, -1};
      if (!S::kSingle && masked && !in_place<S>(p)) {
        position[0] = key_position<S>(p, segment.keys, key);
        position[1] = key_position<S>(p, segment.keys, key + 8);
      }
      cuda::cp_async_wait<S::kStages - 1>();
      __syncwarp();
      if (!S::kRing || vacant != kAllRows) {
        if constexpr (S::kRing || S::kSingle) {
          repair_tile<S>(p, segment.keys, item, shared_memory + (stage - base), vacant, new_token);
          __syncwarp();
        }
        if (!S::kSingle && rotate && masked) {
          rotate_tile<S>(p, segment.keys, item, shared_memory + (stage - base));
          __syncwarp();
        }
        const bool first = item == segment.begin + offset;
        attend_tile<S>(state, queries, stage, scale_log2, first, [&](float (&s)[S::kRowTiles][4]) {
          if (p.softcap > 0.f) {
#pragma unroll
            for (int n = 0; n < S::kRowTiles; ++n) {
#pragma unroll
              for (int i = 0; i < 4; ++i) s[n][i] = cuda::soft_capped(s[n][i], p.softcap * kLog2e);
            }
          }
          if (!masked) return;
          const RingLayout layout = {p.sink, S::kRing ? p.window : 0, p.slots};
#pragma unroll
          for (int n = 0; n < S::kRowTiles; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const bool visible = in_place<S>(p) ? (vacant >> (lane / 4 + i / 2 * 8) & 1) == 0
                                                  : layout.visible(position[i / 2], query_position[n][i % 2]);
              if (!visible) s[n][i] = -INFINITY;
            }
          }
        });
      }
      __syncwarp();  // all lanes have read the stage before any lane loads into it again
      const int ahead = item + S::kStages * step;
      if (ahead < segment.end) load_tile<S>(p, segment.keys, ahead, stage);
      cuda::cp_async_commit();
      stage = stage + S::kStageBytes == ring_end ? ring : stage + S::kStageBytes;
    }

    const Segment done = segment;
    more = job.next(segment);
    if (more) {
      __syncwarp();
      fill();
    }
    job.finish(done, state, more);
  }
}

// The job of Shape::kSingle, for either kind of cache: a team per (batch, KV head). Grid: (team, KV heads, batch).
// merge(segment, state) makes one result of the team's states.
template <class S, class Merge>
struct SingleJob {
  const Params& p;
  const Merge& merge;

  // The first tile of each warp is known before the length: of a full cache it may turn out to lie past it, and is
  // asked for only where there is memory whatever the length. (`slots` may be the largest int.)
  __device__ __forceinline__ Segment start() const {
    Segment segment;
    segment.keys = locate_keys<S>(p, blockIdx.z, blockIdx.y);
    segment.row_block = 0;
    segment.begin = blockIdx.x;
    segment.end = S::kRing ? count_items<S>(p, segment.keys) : min(p.slots / kTileKeys + 1, kReadAhead / kTileKeys);
    if (!S::kRing && p.length_first) settle(segment);
    return segment;
  }
  __device__ __forceinline__ void settle(Segment& segment) const {
    settle_keys<S>(p, segment.keys);
    segment.end = count_items<S>(p, segment.keys);
  }
  __device__ __forceinline__ bool next(Segment&) const { return false; }
  __device__ __forceinline__ void finish(const Segment& segment, State<S>& state, bool) const { merge(segment, state); }
};

template <class S, class Merge>
__device__ __forceinline__ void run_single(const Params& p, const Merge& merge) {
  if (in_cluster<S>(p)) cuda::cluster_arrive_relaxed();
  SingleJob<S, Merge> job = {p, merge};
  run_segments<S>(p, job.start(), job);
}

}  // namespace zigzag::attend
