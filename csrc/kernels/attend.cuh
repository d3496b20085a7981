// The math core of both decode kernels: flash attention of a few query rows over a long key list, on tensor cores.
//
// Operands are swapped: S^T = K Q^T and O^T = V^T P^T with mma.m16n8k16, so that a warp step takes 16 keys and the 8
// columns of the mma hold query rows: nothing is padded to 16 or 64 rows. Every warp streams its own tiles through its
// own ring of shared memory stages (cp.async) and keeps its own softmax state; warps meet only when a segment ends.
// Logits are in base 2.
//
// Fragments, lane = 4 * g + t: a lane holds of S^T and P^T keys g, g + 8 x rows 2t, 2t + 1, and of O^T dims g, g + 8 x
// rows 2t, 2t + 1.
#pragma once

#include "kernels/attend_keys.cuh"
#include "kernels/attend_merge.cuh"

namespace zigzag::attend {

// ---- queries ----

// Starts the copy of the segment's query rows to shared memory, 16 bytes a thread; rows past the last become zeros.
template <class S>
__device__ __forceinline__ void stage_queries(const Params& p, const Segment& segment, uint32_t buffer) {
  for (int i = threadIdx.x; i < S::kRows * S::kChunks; i += blockDim.x) {
    const int row = i / S::kChunks, chunk = i % S::kChunks;
    const auto [column, group_head] = unpack_row(p, segment.row_block * S::kRows + row);
    const int head = segment.keys.kv_head * p.group + group_head;
    const bool valid = column < p.q_len;
    const char* source = static_cast<const char*>(p.q);
    if (valid) {
      source +=
          2 * (segment.keys.batch * p.q_stride.batch + head * p.q_stride.head + column * p.q_stride.token) + chunk * 16;
    }
    device::cp_async_16(buffer + swizzled(row, chunk, S::kRowBytes), source, valid);
  }
}

// B fragments of Q^T: in registers where they fit beside the accumulators, else read again for every tile.
template <class S>
struct Queries {
  static constexpr bool kInRegisters = S::kRowTiles * S::kSteps <= 16;
  static_assert(S::kRowTiles == 1 || S::kRowTiles == 2);
  static_assert(kInRegisters || S::kRowTiles == 2);

  uint32_t address;
  uint32_t fragment[kInRegisters ? S::kSteps : 1][S::kRowTiles][2];

  __device__ __forceinline__ void attach(uint32_t buffer) {
    const int lane = threadIdx.x % 32;
    if constexpr (S::kRowTiles == 1) {  // one ldmatrix covers two steps
      address = buffer + swizzled(lane % 8, lane / 8, S::kRowBytes);
#pragma unroll
      for (int step = 0; step < S::kSteps; step += 2) {
        uint32_t r[4];  // where the number of steps is odd, the last half lies beyond head_dim and is not used
        device::ldmatrix_x4(r, advance_chunks(address, 2 * step));
        fragment[step][0][0] = r[0], fragment[step][0][1] = r[1];
        if (step + 1 < S::kSteps) fragment[step + 1][0][0] = r[2], fragment[step + 1][0][1] = r[3];
      }
    } else {  // one ldmatrix covers both row tiles
      address = buffer + swizzled(lane % 8 + lane / 16 * 8, lane / 8 % 2, S::kRowBytes);
      if constexpr (kInRegisters) {
#pragma unroll
        for (int step = 0; step < S::kSteps; ++step) read(step, fragment[step]);
      }
    }
  }

  __device__ __forceinline__ void read(int step, uint32_t (&b)[S::kRowTiles][2]) const {
    uint32_t r[4];
    device::ldmatrix_x4(r, advance_chunks(address, 2 * step));
    b[0][0] = r[0], b[0][1] = r[1];
    if constexpr (S::kRowTiles == 2) b[1][0] = r[2], b[1][1] = r[3];
  }

  __device__ __forceinline__ void get(int step, uint32_t (&b)[S::kRowTiles][2]) const {
    if constexpr (kInRegisters) {
#pragma unroll
      for (int n = 0; n < S::kRowTiles; ++n) b[n][0] = fragment[step][n][0], b[n][1] = fragment[step][n][1];
    } else {
      read(step, b);
    }
  }
};

// ---- the warp step ----

// Raises the running maxima to cover the logits `s` and rescales what was summed before. Most tiles raise none.
template <class S>
__device__ __forceinline__ void raise_max(State<S>& state, const float (&s)[S::kRowTiles][4]) {
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
  if (!__any_sync(0xffffffffu, raised)) return;
#pragma unroll
  for (int n = 0; n < S::kRowTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float m = fmaxf(high[n][e], state.max[n][e]);
#pragma unroll
      for (int offset = 4; offset < 32; offset *= 2) m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, offset));
      const float factor = device::exp2_approx(state.max[n][e] - m);
      state.max[n][e] = m;
      state.sum[n][e] *= factor;
#pragma unroll
      for (int step = 0; step < S::kSteps; ++step) {
        state.out[step][n][e] *= factor;
        state.out[step][n][e + 2] *= factor;
      }
    }
  }
}

// Adds the 16 keys of a stage to the state. mask(s) sets the logits of keys a row must not see to -inf.
template <class S, class Mask>
__device__ __forceinline__ void attend_tile(State<S>& state, const Queries<S>& queries, uint32_t stage,
                                            float scale_log2, const Mask& mask) {
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
    device::ldmatrix_x4(k, advance_chunks(k_address, 2 * step));
    queries.get(step, b);
#pragma unroll
    for (int n = 0; n < S::kRowTiles; ++n) device::mma_m16n8k16<Element>(chain[step % kChains][n], k, b[n][0], b[n][1]);
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
  raise_max(state, s);

  uint32_t weights[S::kRowTiles][2];  // B fragments of P^T
#pragma unroll
  for (int n = 0; n < S::kRowTiles; ++n) {
    float e[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) e[i] = device::exp2_approx(s[n][i] - state.max[n][i % 2]);
    state.sum[n][0] += e[0] + e[2];
    state.sum[n][1] += e[1] + e[3];
    weights[n][0] = device::movmatrix_trans(device::pack2<Element>(e[0], e[1]));
    weights[n][1] = device::movmatrix_trans(device::pack2<Element>(e[2], e[3]));
  }
#pragma unroll
  for (int step = 0; step < S::kSteps; ++step) {
    uint32_t v[4];
    device::ldmatrix_x4_trans(v, advance_chunks(v_address, 2 * step));
#pragma unroll
    for (int n = 0; n < S::kRowTiles; ++n)
      device::mma_m16n8k16<Element>(state.out[step][n], v, weights[n][0], weights[n][1]);
  }
}

// ---- the block's loop over segments ----

// Runs a job: a sequence of segments with a result each. Job:
//   bool next(Segment&)                    moves to the segment after this one; false where there is none
//   void loaded(Segment&)                  called once the first loads of a segment are under way
//   void finish(const Segment&, bool more) called when every warp's partial state of the segment is in shared memory
// The first loads of the next segment are under way before the previous one is finished.
//
// `keys_first` is for programmatic dependent launch: the first tiles are loaded before the wait for the kernel in
// front, which therefore must not be the one that writes the cache or the lengths.
template <class S, bool kRing, class Job>
__device__ __forceinline__ void run_segments(const Params& p, Segment segment, Job& job) {
  bool keys_first = p.keys_first;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const uint32_t base = device::shared_address(shared_memory);
  const uint32_t ring = base + p.layout.ring + warp * p.layout.stages * S::kStageBytes;
  const float scale_log2 = p.scale * kLog2e;
  uint32_t query_buffer = base;

  NewToken<S> new_token;
  // Query rows first: behind the key loads they would arrive last. They form one cp.async group, every tile another
  // one.
  const auto fill = [&] {
    const auto fill_queries = [&] {
      device::grid_dependency_wait();
      stage_queries<S>(p, segment, query_buffer);
      device::cp_async_commit();
      if (kRing && replaces_slot(p)) new_token.load(p, segment.keys);
    };
    if (!keys_first) fill_queries();
#pragma unroll
    for (int i = 0; i < S::kStages - 1; ++i) {
      const int item = segment.begin + warp + i * warps;
      if (item < segment.end) load_tile<S>(p, segment.keys, item, ring + i * S::kStageBytes);
      device::cp_async_commit();
    }
    if (keys_first) fill_queries();
    job.loaded(segment);
  };

  fill();
  device::grid_dependency_launch();
  for (bool more = true; more;) {
    if (keys_first) {
      device::cp_async_wait<0>();
      keys_first = false;
    } else {
      device::cp_async_wait<S::kStages - 1>();
    }
    __syncthreads();  // the queries are staged, and nobody reads the partial states of the previous segment any more
    Queries<S> queries;
    queries.attach(query_buffer);
    State<S> state;
    state.clear();
    int query_position[S::kRowTiles][2];
#pragma unroll
    for (int n = 0; n < S::kRowTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = unpack_row(p, segment.row_block * S::kRows + 8 * n + 2 * (lane % 4) + e).column;
        query_position[n][e] = segment.keys.length + column - segment.keys.first;
      }
    }

    uint32_t stage = ring, load_stage = ring + (S::kStages - 1) * S::kStageBytes;
    const uint32_t ring_end = ring + S::kStages * S::kStageBytes;
    for (int item = segment.begin + warp; item < segment.end; item += warps) {
      const int ahead = item + (S::kStages - 1) * warps;
      if (ahead < segment.end) load_tile<S>(p, segment.keys, ahead, load_stage);
      device::cp_async_commit();

      const int key = item * kTileKeys + lane / 4;  // this lane's first key; the other is 8 further
      const bool masked = (item + 1) * kTileKeys > segment.keys.unmasked;
      int position[2] = {-1, -1};
      if (masked) {
        position[0] = key_position<kRing>(p, segment.keys, key);
        position[1] = key_position<kRing>(p, segment.keys, key + 8);
      }
      device::cp_async_wait<S::kStages - 1>();
      __syncwarp();
      if constexpr (kRing) {
        repair_tile<S>(segment.keys, item, shared_memory + (stage - base), new_token);
        __syncwarp();
      }
      attend_tile<S>(state, queries, stage, scale_log2, [&](float (&s)[S::kRowTiles][4]) {
        if (!masked) return;
        const RingLayout ring_or_full = {p.sink, kRing ? p.window : 0};
#pragma unroll
        for (int n = 0; n < S::kRowTiles; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (!ring_or_full.visible(position[i / 2], query_position[n][i % 2])) s[n][i] = -INFINITY;
          }
        }
      });
      __syncwarp();  // all lanes have read the stage before any lane loads into it again
      stage = stage + S::kStageBytes == ring_end ? ring : stage + S::kStageBytes;
      load_stage = load_stage + S::kStageBytes == ring_end ? ring : load_stage + S::kStageBytes;
    }

    const Segment done = segment;
    more = job.next(segment);
    if (more) {
      query_buffer = query_buffer == base ? base + S::kRows * S::kRowBytes : base;
      fill();
    }
    store_partial<S>(p.layout, state, rows_of<S>(p, done));
    __syncthreads();
    job.finish(done, more);
  }
}

}  // namespace zigzag::attend
