// Attention over quantised caches: decode/segments.cuh with other tiles. Codes become operands in registers, nothing is
// written back dequantised.
//
// All operands are float16, whatever the element type: it holds every code, and query rows scaled by a power of two.
// Sums are float32. Both mma are free in the order of what they sum over or spread out, so that a lane takes the codes
// that ldmatrix gives it, n = 4 or 8 in a register, and the queries (for S^T = K Q^T) or the place of the result (for
// O^T = V^T P^T) follow. Lane = 4 g + t, piece = 16 bytes of a row:
//
//   K    codes n t .. + n - 1 of a piece, of keys g and g + 8
//   V    codes n / 2 g .. + n / 2 - 1 of a piece, of keys 2 t, 2 t + 1 and 2 t + 8, 2 t + 9
//
// Codes enter with the unit and the offset of their format (kv/formats.h). Keys: the sum of a query row times the
// offset is what its logits start from. Values: an mma of the offsets takes them off tile by tile, so that they never
// add up; units are applied when a segment ends.
//
// Scales: that of a key multiplies its logit s. With that of a value, sV, the weight is w = 2^(s + log2 sV - m +
// kLift), where m is the running maximum of s + log2 sV: it fits float16 whatever the values' magnitude. The sum of
// exponentials adds w / sV. Where this ends, logits being in base 2 and scales 2^-89 to 2^125 (kv/code_bits.h):
//
// - The sum of 8 million keys stays below 2^126 and above 2^-112, so that its reciprocal is a normal float.
// - A weight below 2^-25 is 0 in float16: shares of the result below 2^-39 of the largest one are left out.
// - A weight below 2^-126 is 0 in float32: a key whose s + log2 sV is below m - 140 is left out of the sum, too. What
//   comes out is attention without it: finite and no larger than the values, but wrong where the key has probability.
//   While the scales of a head's values are within 2^110 of each other it has less than 2^-30 of that of another key.
//   (Values of float16 elements are within 2^46; bfloat16 goes further, models do not.)
#pragma once

#include <climits>

#include "core/dispatch.h"
#include "kernels/decode/codes/dispatch.h"
#include "kernels/decode/codes/queries.cuh"
#include "kernels/decode/codes/tile.cuh"
#include "kernels/decode/segments.cuh"

namespace zigzag::attend {

// log2 of the largest weight: as far up as float16 and the sums have room, for the sake of millions of small weights.
inline constexpr float kLift = 14.f;

template <class Element, class KFormat, class VFormat, int kHeadDim, int kRowTiles, bool kRing>
struct CodeShape : Shape<Element, kHeadDim, kRowTiles, kRing, false> {
  using Base = Shape<Element, kHeadDim, kRowTiles, kRing, false>;
  using KTile = CodeTile<KFormat, kHeadDim>;
  using VTile = CodeTile<VFormat, kHeadDim>;
  static constexpr bool kCodes = true;
  using NewPiece = NewVector<CodeShape>;
  static constexpr int kScales = KTile::kBytes + VTile::kBytes;  // where a stage has its scales
  static constexpr BlockShape kBlock = {kHeadDim, kRowTiles, {KFormat::kFormat, VFormat::kFormat}};
  static constexpr int kStageBytes = kBlock.stage_bytes();
  static constexpr int kStages = kBlock.stages();
  static_assert(kStageBytes == kScales + 2 * kTileKeys * 4);

  // Where a stage has the scale of a row: those of keys g, g + 8 and values g, g + 8 side by side.
  __device__ __forceinline__ static int scale_at(bool is_v, int row) {
    return kScales + row % 8 * 16 + (is_v ? 8 : 0) + row / 8 * 4;
  }

  __device__ __forceinline__ static constexpr int out_dim(int step, int g, int half) {
    constexpr int kPieceSteps = 8 / VFormat::kBits;  // mma steps of a piece
    return 16 * kPieceSteps * (step / kPieceSteps) + 2 * kPieceSteps * g + 2 * (step % kPieceSteps) + half;
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

// Address of this lane's row in the first of the ldmatrix of a tile; pieces 2 i, 2 i + 1 are i << 5 further, by xor.
template <class Tile>
__device__ __forceinline__ uint32_t first_pieces(uint32_t tile) {
  static_assert(Tile::kChunks % 2 == 0 && Tile::kBytes % 128 == 0);
  return tile + Tile::place(threadIdx.x % 16, threadIdx.x % 32 / 16 * 16);
}

// s[n][..] = logits of keys g, g + 8 without the keys' scales.
template <class S>
__device__ __forceinline__ void code_logits(const CodeQueries<S>& queries, uint32_t tile, float (&s)[S::kRowTiles][4]) {
  using Format = typename S::KTile::Format;
  constexpr int kPairs = 16 / Format::kBits;
  constexpr int kChains = S::kRowTiles == 1 ? 2 : 1;  // two chains of dependent mma halve their latency
  float chain[kChains][S::kRowTiles][4] = {};
#pragma unroll
  for (int n = 0; n < S::kRowTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) chain[0][n][i] = Format::offset(0) != 0 ? queries.bias[n][i % 2] : 0.f;
  }
  const uint32_t address = first_pieces<typename S::KTile>(tile);
#pragma unroll
  for (int piece = 0; piece < S::KTile::kChunks; piece += 2) {
    uint32_t codes[4];  // keys g, g + 8 of this piece, then of the next
    cuda::ldmatrix_x4(codes, address ^ (piece << 4));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t low[kPairs], high[kPairs];
      Format::widen_row(codes[2 * half], low);
      Format::widen_row(codes[2 * half + 1], high);
#pragma unroll
      for (int i = 0; i < kPairs; i += 2) {
        const int step = (piece + half) * kPairs / 2 + i / 2;
        const uint32_t a[4] = {low[i], high[i], low[i + 1], high[i + 1]};
#pragma unroll
        for (int n = 0; n < S::kRowTiles; ++n) {
          const uint32_t (&b)[2] = queries.fragment[step][n];
          cuda::mma_m16n8k16<__half>(chain[step % kChains][n], a, b[0], b[1]);
        }
      }
    }
  }
#pragma unroll
  for (int n = 0; n < S::kRowTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      s[n][i] = queries.factor[n][i % 2] * (kChains == 2 ? chain[0][n][i] + chain[kChains - 1][n][i] : chain[0][n][i]);
    }
  }
}

// state.out += V^T P^T.
template <class S>
__device__ __forceinline__ void add_code_values(State<S>& state, const uint32_t (&weights)[S::kRowTiles][2],
                                                uint32_t tile) {
  using Format = typename S::VTile::Format;
  constexpr int kPairs = 16 / Format::kBits;
  if constexpr (Format::offset(0) != 0) {  // first and by themselves: no mma waits for the one before it
    constexpr uint32_t kMinus = 0x80008000u;
    constexpr uint32_t kEven = kMinus | Format::offset(0) * 0x10001u, kOdd = kMinus | Format::offset(1) * 0x10001u;
    const uint32_t offsets[4] = {kEven, kOdd, kEven, kOdd};
#pragma unroll
    for (int step = 0; step < S::kSteps; ++step) {
#pragma unroll
      for (int n = 0; n < S::kRowTiles; ++n) {
        cuda::mma_m16n8k16<__half>(state.out[step][n], offsets, weights[n][0], weights[n][1]);
      }
    }
  }
  const uint32_t address = first_pieces<typename S::VTile>(tile);
#pragma unroll
  for (int piece = 0; piece < S::VTile::kChunks; piece += 2) {
    uint32_t codes[4];  // two keys of 0 .. 7 and two of 8 .. 15 of this piece, then of the next
    cuda::ldmatrix_x4_trans(codes, address ^ (piece << 4));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t low[kPairs], high[kPairs];
      Format::widen_columns(codes[2 * half], low);
      Format::widen_columns(codes[2 * half + 1], high);
#pragma unroll
      for (int i = 0; i < kPairs; i += 2) {
        const int step = (piece + half) * kPairs / 2 + i / 2;
        const uint32_t a[4] = {low[i], low[i + 1], high[i], high[i + 1]};
#pragma unroll
        for (int n = 0; n < S::kRowTiles; ++n) {
          cuda::mma_m16n8k16<__half>(state.out[step][n], a, weights[n][0], weights[n][1]);
        }
      }
    }
  }
}

template <class S>
struct CodeState : State<S> {
  float base[S::kRowTiles][2];  // max - kLift: weights are relative to it

  __device__ __forceinline__ void set_max(int n, int e, float m) { this->max[n][e] = m, base[n][e] = m - kLift; }

  // As merges take it: out without the units of the values, max as what it and the sum are relative to.
  __device__ __forceinline__ void finish() {
    using Format = typename S::VTile::Format;
#pragma unroll
    for (int n = 0; n < S::kRowTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) this->max[n][e] -= kLift;
#pragma unroll
      for (int step = 0; step < S::kSteps; ++step) {
#pragma unroll
        for (int i = 0; i < 4; ++i) this->out[step][n][i] *= 1.0f / Format::unit(i / 2);
      }
    }
  }
};

// Adds the 16 keys of a stage to the state. mask(s) sets the logits of keys a row must not see to -inf. softcap: in
// units of log2, 0: none.
template <class S, class Mask>
__device__ __forceinline__ void attend_code_tile(CodeState<S>& state, const CodeQueries<S>& queries, int stage,
                                                 bool first, float softcap, const Mask& mask) {
  const uint32_t keys = cuda::shared_address(shared_memory) + stage, values = keys + S::KTile::kBytes;
  // Of the keys of g and g + 8, of the values.
  const float4 scales =
      *reinterpret_cast<const float4*>(shared_memory + stage + S::kScales + threadIdx.x % 32 / 4 * 16);
  const float factor[2] = {scales.x, scales.y};
  float shift[2] = {cuda::log2_approx(scales.z), cuda::log2_approx(scales.w)};
  // A scale of zero means that there is no key, and a weight of zero. No other scale is below 2^-90.
  const float inverse[2] = {cuda::reciprocal_approx(fmaxf(scales.z, 0x1p-100f)),
                            cuda::reciprocal_approx(fmaxf(scales.w, 0x1p-100f))};
  if constexpr (S::KTile::Format::offset(0) != 0) {
    // Infinite scales make NaN of a logit of zero; this one is rounded.
#pragma unroll
    for (int i = 0; i < 2; ++i) shift[i] = fmaf(factor[i], 0.f, shift[i]);
  }
  float s[S::kRowTiles][4];
  code_logits<S>(queries, keys, s);
#pragma unroll
  for (int n = 0; n < S::kRowTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (softcap > 0.f) {
        s[n][i] = cuda::soft_capped(s[n][i] * factor[i / 2], softcap) + shift[i / 2];
      } else {
        s[n][i] = fmaf(s[n][i], factor[i / 2], shift[i / 2]);
      }
    }
  }
  mask(s);
  raise_max<S>(state, s, first);

  uint32_t weights[S::kRowTiles][2];  // B fragments of P^T
#pragma unroll
  for (int n = 0; n < S::kRowTiles; ++n) {
    float e[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) e[i] = cuda::exp2_approx(s[n][i] - state.base[n][i % 2]);
    state.sum[n][0] += e[0] * inverse[0] + e[2] * inverse[1];
    state.sum[n][1] += e[1] * inverse[0] + e[3] * inverse[1];
    weights[n][0] = cuda::movmatrix_trans(cuda::pack2<__half>(e[0], e[1]));
    weights[n][1] = cuda::movmatrix_trans(cuda::pack2<__half>(e[2], e[3]));
  }
  add_code_values<S>(state, weights, values);
}

// run_segments of decode/segments.cuh for quantised caches; jobs are the same.
template <class S, class Job>
__device__ __forceinline__ void run_code_segments(const Params& p, Segment segment, Job& job) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const uint32_t base = cuda::shared_address(shared_memory);
  const int query_buffer = warp * S::kRows * S::kRowBytes;
  const int ring = p.layout.ring + warp * p.layout.stages * S::kStageBytes;
  const bool rotate = turning_pairs(p) > 0;
  CodeReader reader;
  const auto load = [&](int item, int stage) {
    if (item < segment.end) load_code_tile<S>(p, segment.keys, reader, item, base + stage, shared_memory + stage);
    cuda::cp_async_commit();
  };
  const auto fill = [&] {
    reader.attach<S>(p, segment.keys);
    cuda::grid_dependency_wait();
    cuda::grid_dependency_launch();
    SegmentTokens<S> appended;
    appended.load(p, segment);
    RotatedQueries<S> rotated;
    if (rotate) {
      rotated.load_and_store(p, segment, shared_memory + query_buffer);
    } else {
      stage_queries<S>(p, segment, base + query_buffer);  // travels with the first tile
    }
    // Tiles with new tokens, which are the last ones, wait until those are appended. (One loop, for the sake of code
    // size.)
    const int first_new = appended.any ? segment.keys.length / kTileKeys : segment.end;
    int i = 0, item = segment.begin + warp;
#pragma unroll 1
    for (int until = first_new;; until = INT_MAX) {
#pragma unroll 1
      for (; i < S::kStages && item < until; ++i, item += warps) load(item, ring + i * S::kStageBytes);
      if (until == INT_MAX) break;
      if (!appended.any) continue;
      appended.append(p, segment);
      __syncthreads();
    }
  };

  fill();
  for (bool more = true; more;) {
    CodeState<S> state;
    state.clear();
    CodeQueries<S> queries;
    cuda::cp_async_wait<S::kStages - 1>();
    __syncwarp();
    queries.attach(shared_memory + query_buffer, p.scale * kLog2e);
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
      cuda::cp_async_wait<S::kStages - 1>();
      __syncwarp();
      const bool first = item == segment.begin + warp;
      attend_code_tile<S>(state, queries, stage, first, p.softcap * kLog2e, [&](float (&s)[S::kRowTiles][4]) {
        if (!masked) return;
        const RingLayout layout = {p.sink, S::kRing ? p.window : 0, p.slots};
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

    state.finish();
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
