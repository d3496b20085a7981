// Attention over quantised caches: attend.cuh with other tiles. Codes become operands in registers, nothing is written
// back dequantised.
//
// Both mma are free in the order of what they sum over or spread out: a lane takes the four neighbouring codes it can
// load at once, and the queries (for S^T = K Q^T) or the place of the result (for O^T = V^T P^T) follow. Lane = 4 g +
// t:
//
//   K    dims 16 step + 4 t .. + 3 of keys g and g + 8
//   V    dims 32 i + 4 g .. + 3 of keys 2 t, 2 t + 1, 2 t + 8, 2 t + 9, for the steps 2 i and 2 i + 1
//
// Scales: that of a key multiplies its logit s. With that of a value, sV, the weight is 2^(s + log2 sV - m), where m is
// the running maximum of the same sum: it is at most 1 whatever the values' magnitude, in either 16-bit type. The sum
// of exponentials adds the weight over sV.
#pragma once

#include "core/dispatch.h"
#include "kernels/attend.cuh"
#include "kernels/attention_codes.h"
#include "kernels/code_tile.cuh"

namespace zigzag::attend {

template <class Element, class KFormat, class VFormat, int kHeadDim, int kRowTiles, bool kRing>
struct CodeShape : Shape<Element, kHeadDim, kRowTiles, kRing, false> {
  using Base = Shape<Element, kHeadDim, kRowTiles, kRing, false>;
  using KTile = CodeTile<KFormat, kHeadDim>;
  using VTile = CodeTile<VFormat, kHeadDim>;
  static constexpr bool kCodes = true;
  static constexpr int kStageBytes = KTile::kBytes + VTile::kBytes + 2 * kTileKeys * 4;  // the last: scales
  // As deep as shared memory of 8 warps allows beside queries and partial results, from 3 to 6 stages.
  static constexpr int kFree = 227 * 1024 / kMaxWarps - Base::kRows * (Base::kRowBytes + 4 * (kHeadDim + 4) + 8);
  static constexpr int kStages = kFree / kStageBytes < 3 ? 3 : kFree / kStageBytes > 6 ? 6 : kFree / kStageBytes;

  __device__ __forceinline__ static void append(const AttentionParams& p, const Keys& keys, int thread, int count) {
    append_codes<CodeShape>(p, keys, thread, count);
  }

  __device__ __forceinline__ static constexpr int out_dim(int step, int g, int half) {
    if ((step | 1) >= Base::kSteps) return 16 * step + 2 * g + half;
    return 32 * (step / 2) + 4 * g + 2 * (step % 2) + half;
  }
};

// f(shape) with the CodeShape of a call, which attention_codes_cuda() has checked. A row of codes is whole 16-byte
// pieces.
template <class KFormat, class VFormat, bool kRing, class F>
void dispatch_code_shape(const AttentionParams& a, F&& f) {
  dispatch_head_dim(a.head_dim, [&](auto head_dim) {
    constexpr int kHeadDim = head_dim.value;
    if constexpr (has_code_kernels(kHeadDim)) {
      dispatch_bool(a.num_q_heads / a.num_kv_heads * a.q_len > 8, [&](auto two_row_tiles) {
        constexpr int kRowTiles = two_row_tiles.value ? 2 : 1;
        if (a.dtype == DType::kBFloat16) {
          f(CodeShape<__nv_bfloat16, KFormat, VFormat, kHeadDim, kRowTiles, kRing>{});
        } else {
          f(CodeShape<__half, KFormat, VFormat, kHeadDim, kRowTiles, kRing>{});
        }
      });
    }
  });
}

// B fragments of Q^T in the order of the keys' codes.
template <class S>
struct CodeQueries {
  static constexpr bool kInRegisters = S::kRowTiles * S::kSteps <= 16;
  const char* rows;
  uint32_t fragment[kInRegisters ? S::kSteps : 1][S::kRowTiles][2];

  __device__ __forceinline__ void read(int step, uint32_t (&b)[S::kRowTiles][2]) const {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < S::kRowTiles; ++n) {
      const int row = 8 * n + g, byte = 32 * step + 8 * t;
      const uint2 quad = *reinterpret_cast<const uint2*>(rows + swizzled(row, byte / 16, S::kRowBytes) + byte % 16);
      element_pairs<typename S::KTile::Format>(quad, b[n][0], b[n][1]);
    }
  }
  __device__ __forceinline__ void attach(const char* buffer) {
    rows = buffer;
    if constexpr (kInRegisters) {
#pragma unroll
      for (int step = 0; step < S::kSteps; ++step) read(step, fragment[step]);
    }
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

// s[n][..] = raw logits of keys g, g + 8.
template <class S>
__device__ __forceinline__ void code_logits(const CodeQueries<S>& queries, const char* tile,
                                            float (&s)[S::kRowTiles][4]) {
  using Format = typename S::KTile::Format;
  using Element = typename S::Element;
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  constexpr int kChains = S::kRowTiles == 1 ? 2 : 1;  // two chains of dependent mma halve their latency
  float chain[kChains][S::kRowTiles][4] = {};
#pragma unroll
  for (int step = 0; step < S::kSteps; ++step) {
    const int byte = (16 * step + 4 * t) * Format::kBits / 8;
    uint32_t a[4], b[S::kRowTiles][2];
    const auto quad = [&](int row) {
      return *reinterpret_cast<const Quad<Format>*>(tile + S::KTile::place(row, byte));
    };
    widen_quad<Format, Element>(quad(g), a[0], a[2]);
    widen_quad<Format, Element>(quad(g + 8), a[1], a[3]);
    queries.get(step, b);
#pragma unroll
    for (int n = 0; n < S::kRowTiles; ++n) device::mma_m16n8k16<Element>(chain[step % kChains][n], a, b[n][0], b[n][1]);
  }
#pragma unroll
  for (int n = 0; n < S::kRowTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) s[n][i] = kChains == 2 ? chain[0][n][i] + chain[kChains - 1][n][i] : chain[0][n][i];
  }
}

// state.out += V^T P^T.
template <class S>
__device__ __forceinline__ void add_code_values(State<S>& state, const uint32_t (&weights)[S::kRowTiles][2],
                                                const char* tile) {
  using Format = typename S::VTile::Format;
  using Element = typename S::Element;
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const auto add = [&](int step, const uint32_t (&a)[4]) {
#pragma unroll
    for (int n = 0; n < S::kRowTiles; ++n) {
      device::mma_m16n8k16<Element>(state.out[step][n], a, weights[n][0], weights[n][1]);
    }
  };
#pragma unroll
  for (int step = 0; step + 1 < S::kSteps; step += 2) {
    const int byte = (16 * step + 4 * g) * Format::kBits / 8;
    const auto quad = [&](int row) -> uint32_t {
      return *reinterpret_cast<const Quad<Format>*>(tile + S::VTile::place(row, byte));
    };
    const uint32_t x = quad(2 * t), y = quad(2 * t + 1), z = quad(2 * t + 8), w = quad(2 * t + 9);
    const uint32_t low[4] = {widen_across<Format, Element, 0>(x, y), widen_across<Format, Element, 1>(x, y),
                             widen_across<Format, Element, 0>(z, w), widen_across<Format, Element, 1>(z, w)};
    const uint32_t high[4] = {widen_across<Format, Element, 2>(x, y), widen_across<Format, Element, 3>(x, y),
                              widen_across<Format, Element, 2>(z, w), widen_across<Format, Element, 3>(z, w)};
    add(step, low);
    add(step + 1, high);
  }
  if constexpr (S::kSteps % 2 != 0) {  // 16 dims are left: two of each lane
    const int byte = (16 * (S::kSteps - 1) + 2 * g) * Format::kBits / 8;
    using Pair = std::conditional_t<Format::kBits == 8, uint16_t, uint8_t>;
    const auto pair = [&](int row) -> uint32_t {
      return *reinterpret_cast<const Pair*>(tile + S::VTile::place(row, byte));
    };
    const uint32_t x = pair(2 * t), y = pair(2 * t + 1), z = pair(2 * t + 8), w = pair(2 * t + 9);
    const uint32_t last[4] = {widen_across<Format, Element, 0>(x, y), widen_across<Format, Element, 1>(x, y),
                              widen_across<Format, Element, 0>(z, w), widen_across<Format, Element, 1>(z, w)};
    add(S::kSteps - 1, last);
  }
}

// Adds the 16 keys of a stage to the state. mask(s) sets the logits of keys a row must not see to -inf.
template <class S, class Mask>
__device__ __forceinline__ void attend_code_tile(State<S>& state, const CodeQueries<S>& queries, const char* stage,
                                                 float scale_log2, bool first, const Mask& mask) {
  using Element = typename S::Element;
  const int g = threadIdx.x % 32 / 4;
  const char* values = stage + S::KTile::kBytes;
  const float* scales = reinterpret_cast<const float*>(values + S::VTile::kBytes);
  float factor[2], shift[2], inverse[2];  // of keys g, g + 8
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    factor[i] = scale_log2 * scales[g + 8 * i];
    const float scale = scales[kTileKeys + g + 8 * i];
    shift[i] = device::log2_approx(scale);
    inverse[i] = scale == 0.f ? 0.f : device::reciprocal_approx(scale);  // no key: its weight is 0
  }
  float s[S::kRowTiles][4];
  code_logits<S>(queries, stage, s);
#pragma unroll
  for (int n = 0; n < S::kRowTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) s[n][i] = fmaf(s[n][i], factor[i / 2], shift[i / 2]);
  }
  mask(s);
  raise_max(state, s, first);

  uint32_t weights[S::kRowTiles][2];  // B fragments of P^T
#pragma unroll
  for (int n = 0; n < S::kRowTiles; ++n) {
    float e[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) e[i] = device::exp2_approx(s[n][i] - state.max[n][i % 2]);
    state.sum[n][0] += e[0] * inverse[0] + e[2] * inverse[1];
    state.sum[n][1] += e[1] * inverse[0] + e[3] * inverse[1];
    weights[n][0] = device::movmatrix_trans(device::pack2<Element>(e[0], e[1]));
    weights[n][1] = device::movmatrix_trans(device::pack2<Element>(e[2], e[3]));
  }
  add_code_values<S>(state, weights, values);
}

// run_segments of attend.cuh for quantised caches; jobs are the same.
template <class S, class Job>
__device__ __forceinline__ void run_code_segments(const Params& p, Segment segment, Job& job) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const uint32_t base = device::shared_address(shared_memory);
  const int query_buffer = warp * S::kRows * S::kRowBytes;
  const int ring = p.layout.ring + warp * p.layout.stages * S::kStageBytes;
  const float scale_log2 = p.scale * kLog2e;
  CodeReader reader;
  const auto load = [&](int item, int stage) {
    if (item < segment.end) load_code_tile<S>(p, segment.keys, reader, item, base + stage, shared_memory + stage);
    device::cp_async_commit();
  };
  const auto fill = [&] {
    reader.attach(p, segment.keys);
    device::grid_dependency_wait();
    device::grid_dependency_launch();
    if (turning_pairs(p) == 0) {
      stage_queries<S>(p, segment, base + query_buffer);  // travels with the first tile
    } else {
      RotatedQueries<S> rotated;
#pragma unroll 1
      for (int pass = 0; pass < RotatedQueries<S>::kPasses; pass += RotatedQueries<S>::kBatch) {
        rotated.load(p, segment, pass);
        rotated.store(p, segment, pass, shared_memory + query_buffer);
      }
    }
#pragma unroll 1  // for the sake of code size
    for (int i = 0; i < S::kStages; ++i) load(segment.begin + warp + i * warps, ring + i * S::kStageBytes);
    job.loaded(segment);
  };

  fill();
  for (bool more = true; more;) {
    State<S> state;
    state.clear();
    CodeQueries<S> queries;
    device::cp_async_wait<S::kStages - 1>();
    __syncwarp();
    queries.attach(shared_memory + query_buffer);
    int query_position[S::kRowTiles][2];
#pragma unroll
    for (int n = 0; n < S::kRowTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = unpack_row<S>(p, segment, 8 * n + 2 * (lane % 4) + e).column;
        query_position[n][e] = segment.keys.length + column - segment.keys.first;
      }
    }

    int stage = ring;
    for (int item = segment.begin + warp; item < segment.end; item += warps) {
      const int key = item * kTileKeys + lane / 4;  // this lane's first key; the other is 8 further
      const bool masked = (item + 1) * kTileKeys > segment.keys.unmasked;
      int position[2] = {-1, -1};
      if (masked) {
        position[0] = key_position<S>(p, segment.keys, key);
        position[1] = key_position<S>(p, segment.keys, key + 8);
      }
      device::cp_async_wait<S::kStages - 1>();
      __syncwarp();
      const bool first = item == segment.begin + warp;
      attend_code_tile<S>(state, queries, shared_memory + stage, scale_log2, first, [&](float (&s)[S::kRowTiles][4]) {
        if (!masked) return;
        const RingLayout layout = {p.sink, S::kRing ? p.window : 0};
#pragma unroll
        for (int n = 0; n < S::kRowTiles; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (!layout.visible(position[i / 2], query_position[n][i % 2])) s[n][i] = -INFINITY;
          }
        }
      });
      __syncwarp();  // all lanes have read the stage before any lane loads into it again
      load(item + S::kStages * warps, stage);
      stage += S::kStageBytes;
      if (stage == ring + S::kStages * S::kStageBytes) stage = ring;
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

}  // namespace zigzag::attend
