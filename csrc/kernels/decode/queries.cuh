// The query rows of a segment on their way to the operands of S^T = K Q^T: staged in shared memory by each warp for
// itself, turned by RoPE, read as B fragments. Over quantised caches what is staged is read by codes/queries.cuh.
#pragma once

#include "kernels/decode/rotary.cuh"
#include "kernels/decode/state.cuh"

namespace zigzag::attend {

// Starts the copy of the segment's query rows to the warp's own buffer, 16 bytes a lane. Rows past the last keep what
// they hold: a row of Q only meets its own row of the result.
template <class S>
__device__ __forceinline__ void stage_queries(const Params& p, const Segment& segment, uint32_t buffer) {
  const int rows = rows_of<S>(p, segment), head = segment.keys.head * p.group;
  const int head_step = static_cast<int>(2 * p.q_stride.head);  // fits: check_strides()
  const int column_step = static_cast<int>(2 * p.q_stride.token);
  const char* base =
      static_cast<const char*>(p.q) + 2 * (segment.keys.batch * p.q_stride.batch + head * p.q_stride.head);
#pragma unroll
  for (int i = 0; i < S::kRows * S::kChunks; i += 32) {
    const int row = (i + threadIdx.x % 32) / S::kChunks, chunk = (i + threadIdx.x % 32) % S::kChunks;
    if (row >= rows) break;
    const auto [column, group_head] = unpack_row<S>(p, segment, row);
    const char* source = base + static_cast<int64_t>(group_head) * head_step + chunk * 16;
    if (!S::kSingle) source += static_cast<int64_t>(column) * column_step;
    cuda::cp_async_16_reused(buffer + swizzled(row, chunk, S::kRowBytes), source, true);
  }
}

// The segment's query rows on their way through RoPE to the warp's own buffer: kTall rows a pass, a pair of quads a
// lane, or kParts of a wide row, 32 pairs apart.
template <class S>
struct RotatedQueries {
  static constexpr int kWide = S::kChunks < 32 ? S::kChunks : 32;
  static constexpr int kParts = S::kChunks / kWide;
  static constexpr int kTall = 32 / kWide;  // where kWide does not divide 32, the last lanes idle
  static constexpr int kPasses = (S::kRows + kTall - 1) / kTall;
  // Passes under way together. One new token's are all, and are asked for long before they are used; else they are
  // few, since the previous segment's state still takes up the registers.
  static constexpr int kBatch = S::kSingle ? kPasses : 2;

  static_assert(S::kChunks == kWide * kParts);

  uint4 pair[kBatch][kParts];
  // Where there is one new token, turn[0] has those of pairs `lane`, `lane` + 32, ...
  Turn<typename S::Element> turn[S::kSingle ? 1 : kBatch][kParts];

  __device__ __forceinline__ static int row_of(int pass) {
    const int row = threadIdx.x % 32 / kWide;
    return row < kTall ? pass * kTall + row : S::kRows;
  }
  __device__ __forceinline__ static int pair_of(int part) { return threadIdx.x % 32 % kWide + 32 * part; }

  __device__ __forceinline__ void load(const Params& p, const Segment& segment, int first_pass) {
    const int rows = rows_of<S>(p, segment), head = segment.keys.head * p.group, turning = turning_pairs(p);
    const char* base =
        static_cast<const char*>(p.q) + 2 * (segment.keys.batch * p.q_stride.batch + head * p.q_stride.head);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int row = row_of(first_pass + i);
      if (row >= rows) continue;
      const auto [column, group_head] = unpack_row<S>(p, segment, row);
      const char* source = base + 2 * (group_head * p.q_stride.head + column * p.q_stride.token);
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const QuadPair quads = quads_of(pair_of(part), turning);
        pair[i][part] = load_pair(source, quads);
        if (pair_of(part) < turning && (!S::kSingle || i == 0)) {
          turn[S::kSingle ? 0 : i][part].load(p, segment.keys.batch, column, quads);
        }
      }
    }
  }

  __device__ __forceinline__ void store(const Params& p, const Segment& segment, int first_pass, char* buffer) const {
    const int rows = rows_of<S>(p, segment), turning = turning_pairs(p);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int row = row_of(first_pass + i);
      if (row >= rows) continue;
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const QuadPair quads = quads_of(pair_of(part), turning);
        const bool turns = pair_of(part) < turning;
        const uint4 x = turns ? turn[S::kSingle ? 0 : i][part].apply(p, pair[i][part]) : pair[i][part];
        *quad_at<S>(buffer, row, quads.low) = make_uint2(x.x, x.y);
        *quad_at<S>(buffer, row, quads.high) = make_uint2(x.z, x.w);
      }
    }
  }

  __device__ __forceinline__ void load_and_store(const Params& p, const Segment& segment, char* buffer) {
    const int rows = rows_of<S>(p, segment);
#pragma unroll 1
    for (int pass = 0; pass < kPasses && pass * kTall < rows; pass += kBatch) {
      load(p, segment, pass);
      store(p, segment, pass, buffer);
    }
  }
};

// B fragments of Q^T: in registers where they fit beside the accumulators, else read again for every tile.
template <class S>
struct Queries {
  static constexpr bool kInRegisters = S::kRowTiles * S::kSteps <= 16;
  static_assert(S::kRowTiles == 1 || S::kRowTiles == 2);

  uint32_t address;
  uint32_t fragment[kInRegisters ? S::kSteps : 1][S::kRowTiles][2];

  __device__ __forceinline__ void attach(uint32_t buffer) {
    const int lane = threadIdx.x % 32;
    if constexpr (S::kRowTiles == 1 && kInRegisters) {  // one ldmatrix covers two steps
      address = buffer + swizzled(lane % 8, lane / 8, S::kRowBytes);
#pragma unroll
      for (int step = 0; step < S::kSteps; step += 2) {
        uint32_t r[4];  // where the number of steps is odd, the last half lies beyond head_dim and is not used
        cuda::ldmatrix_x4(r, advance_chunks(address, 2 * step));
        fragment[step][0][0] = r[0], fragment[step][0][1] = r[1];
        if (step + 1 < S::kSteps) fragment[step + 1][0][0] = r[2], fragment[step + 1][0][1] = r[3];
      }
    } else {  // one ldmatrix covers the row tiles (of one the upper half of the lanes gives no addresses)
      address = buffer + swizzled(lane % 8 + lane / 16 * 8, lane / 8 % 2, S::kRowBytes);
      if constexpr (kInRegisters) {
#pragma unroll
        for (int step = 0; step < S::kSteps; ++step) read(step, fragment[step]);
      }
    }
  }

  __device__ __forceinline__ void read(int step, uint32_t (&b)[S::kRowTiles][2]) const {
    if constexpr (S::kRowTiles == 1) {
      cuda::ldmatrix_x2(b[0], advance_chunks(address, 2 * step));
    } else {
      uint32_t r[4];
      cuda::ldmatrix_x4(r, advance_chunks(address, 2 * step));
      b[0][0] = r[0], b[0][1] = r[1], b[1][0] = r[2], b[1][1] = r[3];
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

}  // namespace zigzag::attend
