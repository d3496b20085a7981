// Flash attention of a block of query rows over one tile of keys: scores, online softmax, weighted sum of values.
// Scores are in units of log2, because q arrives multiplied by scale * log2(e).
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <type_traits>
#include <utility>

#include "cpu/vec.h"

namespace zigzag::ZIGZAG_CPU_ISA {

inline constexpr int kTileKeys = 48;    // a multiple of 16, the widest register, and of 12, the sums of one score block
inline constexpr int kScorePitch = 64;  // floats per row of scores: a block that starts late may write past the tile

// Keys [begin, end) of a tile.
struct TileInterval {
  int begin, end;
};

// Query rows and their running softmax. All arrays are [rows] or [rows, head_dim], float.
struct RowBlock {
  int rows, head_dim;
  float* q;
  float* out;  // sum of 2^(score - max) * value
  float* max;
  float* sum;     // sum of 2^(score - max)
  float softcap;  // of scores, in units of log2 as they are; 0: none
  // Scratch of one tile.
  float* scores;           // [rows, kScorePitch], then the weights 2^(score - max)
  float* decay;            // [rows] what the tile's new maximum multiplies the earlier sums by
  TileInterval* interval;  // [rows] keys of the tile that the row sees
};

inline void reset(const RowBlock& block) {
  std::fill_n(block.out, static_cast<int64_t>(block.rows) * block.head_dim, 0.0f);
  std::fill_n(block.max, block.rows, -FLT_MAX);
  std::fill_n(block.sum, block.rows, 0.0f);
}

template <class F, int... kIndex>
[[gnu::always_inline]] inline void unroll(F&& f, std::integer_sequence<int, kIndex...>) {
  (f(std::integral_constant<int, kIndex>{}), ...);
}

// f(0) ... f(kCount - 1), unrolled by the language: only then does GCC keep an array of registers in registers.
template <int kCount, class F>
[[gnu::always_inline]] inline void unroll(F&& f) {
  unroll(f, std::make_integer_sequence<int, kCount>{});
}

// Rows to fetch while others are computed on, line by line in the order of memory: any other order, such as that in
// which values are used, takes half as long again. The hardware alone does not follow from keys to values and back.
struct Ahead {
  const char* row = nullptr;  // nullptr: nothing
  int64_t stride = 0;         // bytes from row to row
  int row_bytes = 0;
  int byte = 0;

  void fetch_line() {
    if (row == nullptr) return;
    __builtin_prefetch(row + byte);
    byte += 64;
    if (byte >= row_bytes) byte = 0, row += stride;
  }
};

// scores[r, key + n] = q[r] . k[key + n] for kRows rows and kKeys keys; keys past `last` repeat the last one. The
// operand with fewer vectors stays in registers, so that 12 sums and the operands fit in 16.
template <int kRows, int kKeys, class T>
inline void score_block(const float* q, int head_dim, const T* k, int64_t stride, int key, int last, float* scores) {
  constexpr int kSums = kRows * kKeys;
  static_assert(kSums % 4 == 0);
  Vec acc[kSums];  // [kRows, kKeys]
  const T* row[kKeys];
  unroll<kKeys>([&](auto n) { row[n] = k + std::min(key + n, last) * stride; });
  unroll<kSums>([&](auto i) { acc[i] = Vec::fill(0.0f); });
  for (int x = 0; x < head_dim; x += Vec::kWidth) {
    const auto query = [&](int r) { return Vec::load(q + r * head_dim + x).pinned(); };
    if constexpr (kKeys < kRows) {
      Vec kx[kKeys];
      unroll<kKeys>([&](auto n) { kx[n] = Vec::load(row[n] + x).pinned(); });
      unroll<kRows>([&](auto r) {
        const Vec qx = query(r);
        unroll<kKeys>([&](auto n) { acc[r * kKeys + n] = Vec::fma(qx, kx[n], acc[r * kKeys + n]); });
      });
    } else {
      Vec qx[kRows];
      unroll<kRows>([&](auto r) { qx[r] = query(r); });
      unroll<kKeys>([&](auto n) {
        const Vec kx = Vec::load(row[n] + x).pinned();
        unroll<kRows>([&](auto r) { acc[r * kKeys + n] = Vec::fma(qx[r], kx, acc[r * kKeys + n]); });
      });
    }
  }
  unroll<kSums / 4>([&](auto quarter) {
    constexpr int i = quarter * 4;
    const auto to = [&](int j) { return scores + j / kKeys * kScorePitch + key + j % kKeys; };
    Vec::sum4(acc[i], acc[i + 1], acc[i + 2], acc[i + 3], to(i), to(i + 1), to(i + 2), to(i + 3));
  });
}

// out[r, x...] = decay[r] * out[r, x...] + sum over keys of scores[r, key] * v[key, x...], for kRows rows and kVecs
// registers.
template <int kRows, int kVecs, class T>
inline void value_block(const float* scores, const float* decay, const T* v, int64_t stride, TileInterval keys,
                        float* out, int head_dim, Ahead& ahead) {
  constexpr int kBytes = kVecs * Vec::kWidth * static_cast<int>(sizeof(T)), kEvery = kBytes < 64 ? 64 / kBytes : 1;
  Vec acc[kRows * kVecs];
  const auto at = [&](int i) { return out + i / kVecs * head_dim + i % kVecs * Vec::kWidth; };
  unroll<kRows * kVecs>([&](auto i) { acc[i] = Vec::load(at(i)) * Vec::fill(decay[i / kVecs]); });
  for (int key = keys.begin; key < keys.end; ++key) {
    if (key % kEvery == 0) {
      for (int byte = 0; byte < kBytes; byte += 64) ahead.fetch_line();
    }
    Vec vx[kVecs];
    unroll<kVecs>([&](auto c) {
      vx[c] = Vec::load(v + key * stride + c * Vec::kWidth);
      if constexpr (kRows > 1) vx[c] = vx[c].pinned();
    });
    unroll<kRows>([&](auto r) {
      const Vec weight = Vec::fill(scores[r * kScorePitch + key]);
      unroll<kVecs>([&](auto c) { acc[r * kVecs + c] = Vec::fma(weight, vx[c], acc[r * kVecs + c]); });
    });
  }
  unroll<kRows * kVecs>([&](auto i) { acc[i].store(at(i)); });
}

template <int kRows, class T>
inline void score_rows(const RowBlock& block, int r, const T* k, int64_t stride, TileInterval keys, Ahead ahead) {
  constexpr int kKeys = 12 / kRows;
  for (int key = keys.begin; key < keys.end; key += kKeys) {
    for (int byte = 0; byte < kKeys * ahead.row_bytes; byte += 64) ahead.fetch_line();
    score_block<kRows, kKeys>(block.q + static_cast<int64_t>(r) * block.head_dim, block.head_dim, k, stride, key,
                              keys.end - 1, block.scores + r * kScorePitch);
  }
}

template <int kRows, class T>
inline void value_rows(const RowBlock& block, int r, const T* v, int64_t stride, TileInterval keys, Ahead ahead) {
  constexpr int kVecs = kRows >= 3 ? 2 : kRows == 2 ? 4 : 8;
  float* out = block.out + static_cast<int64_t>(r) * block.head_dim;
  const float* scores = block.scores + r * kScorePitch;
  int x = 0;
  const auto strip = [&](auto vecs) {
    value_block<kRows, vecs()>(scores, block.decay + r, v + x, stride, keys, out + x, block.head_dim, ahead);
    x += vecs() * Vec::kWidth;
  };
  while (x + kVecs * Vec::kWidth <= block.head_dim) strip(std::integral_constant<int, kVecs>{});
  while (x < block.head_dim) strip(std::integral_constant<int, 1>{});
}

// f(count, r, keys) for the rows in groups of up to four, count a compile-time constant; keys are those that any row of
// the group sees, their begin rounded down so that aligned registers and blocks of keys stay inside the tile.
template <class F>
inline void for_row_groups(const RowBlock& block, F&& f) {
  for (int r = 0; r < block.rows; r += 4) {
    const int rows = std::min(4, block.rows - r);
    TileInterval keys = {kTileKeys, 0};
    for (int i = r; i < r + rows; ++i) {
      if (block.interval[i].begin >= block.interval[i].end) continue;
      keys.begin = std::min(keys.begin, block.interval[i].begin);
      keys.end = std::max(keys.end, block.interval[i].end);
    }
    if (keys.begin >= keys.end) continue;
    keys.begin = keys.begin / 16 * 16;
    switch (rows) {
      case 1: f(std::integral_constant<int, 1>{}, r, keys); break;
      case 2: f(std::integral_constant<int, 2>{}, r, keys); break;
      case 3: f(std::integral_constant<int, 3>{}, r, keys); break;
      default: f(std::integral_constant<int, 4>{}, r, keys); break;
    }
  }
}

// softcap * tanh(score / softcap), with tanh(x) = (1 - e^-2x) / (1 + e^-2x), near 0 by its series: the difference there
// would cancel.
inline void cap_scores(float softcap, float* scores, TileInterval keys) {
  const Vec factor = Vec::fill(2 * 1.44269504088896341f / softcap), most = Vec::fill(-60.0f);
  float powers[kScorePitch];  // below 2^60: beyond that tanh is 1 to the last bit
  for (int i = keys.begin; i < keys.end; i += Vec::kWidth) {
    exp2(Vec::fill(0.0f) - Vec::max(most, Vec::load(scores + i) * factor)).store(powers + i);
  }
  for (int i = keys.begin; i < keys.end; ++i) {
    const float x = scores[i] / softcap, square = x * x;
    const float series = x * (1.0f - square * (1.0f / 3 - square * (2.0f / 15)));
    scores[i] = softcap * (square < 0.01f ? series : (1.0f - powers[i]) / (1.0f + powers[i]));
  }
}

// Turns the scores of the keys in [keys.begin, keys.end) into weights, 0 outside the row's own interval, and folds the
// tile into the row's maximum and sum.
inline void softmax_row(const RowBlock& block, int r, TileInterval keys) {
  const TileInterval seen = block.interval[r];
  float* scores = block.scores + r * kScorePitch;
  block.decay[r] = 1.0f;
  if (seen.begin >= seen.end) {
    std::fill(scores + keys.begin, scores + keys.end, 0.0f);
    return;
  }
  if (block.softcap > 0) cap_scores(block.softcap, scores, seen);
  const int end = (keys.end + Vec::kWidth - 1) / Vec::kWidth * Vec::kWidth;
  std::fill(scores + keys.begin, scores + seen.begin, -INFINITY);
  std::fill(scores + seen.end, scores + end, -INFINITY);
  Vec highest = Vec::fill(block.max[r]);
  for (int i = keys.begin; i < end; i += Vec::kWidth) highest = Vec::max(highest, Vec::load(scores + i));
  const float max = highest.max();
  const Vec shift = Vec::fill(max);
  Vec sum = Vec::fill(0.0f);
  for (int i = keys.begin; i < end; i += Vec::kWidth) {
    const Vec weight = exp2(Vec::load(scores + i) - shift);
    weight.store(scores + i);
    sum = sum + weight;
  }
  block.decay[r] = exp2(block.max[r] - max);
  block.sum[r] = block.sum[r] * block.decay[r] + sum.sum();
  block.max[r] = max;
}

// Attends all rows to the tile's keys that block.interval lets them see; k and v point at the tile's first key.
// `next_k` is the next tile's first key where k and v come from memory in long runs, else nullptr.
template <class T>
inline void attend_tile(const RowBlock& block, const T* k, int64_t k_stride, const T* v, int64_t v_stride,
                        const T* next_k) {
  constexpr int64_t kSize = sizeof(T);
  const int row_bytes = block.head_dim * static_cast<int>(kSize);
  const Ahead values = {next_k == nullptr ? nullptr : reinterpret_cast<const char*>(v), v_stride * kSize, row_bytes};
  const Ahead keys_ahead = {reinterpret_cast<const char*>(next_k), k_stride * kSize, row_bytes};
  for_row_groups(block, [&](auto rows, int r, TileInterval keys) {
    score_rows<rows()>(block, r, k, k_stride, keys, r == 0 ? values : Ahead{});
    for (int i = r; i < r + rows(); ++i) softmax_row(block, i, keys);
  });
  for_row_groups(block, [&](auto rows, int r, TileInterval keys) {
    value_rows<rows()>(block, r, v, v_stride, keys, r == 0 ? keys_ahead : Ahead{});
  });
}

}  // namespace zigzag::ZIGZAG_CPU_ISA
