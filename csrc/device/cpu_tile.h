// Flash attention of a block of query rows over one tile of keys: scores, online softmax, weighted sum of values.
// Scores are in units of log2, because q arrives multiplied by scale * log2(e).
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <type_traits>

#include "device/cpu_vec.h"

namespace zigzag::ZIGZAG_CPU_ISA {

inline constexpr int kTileKeys = 64;

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
  float* sum;  // sum of 2^(score - max)
  // Scratch of one tile.
  float* scores;           // [rows, kTileKeys], then the weights 2^(score - max)
  float* decay;            // [rows] what the tile's new maximum multiplies the earlier sums by
  TileInterval* interval;  // [rows] keys of the tile that the row sees
};

inline void reset(const RowBlock& block) {
  std::fill_n(block.out, static_cast<int64_t>(block.rows) * block.head_dim, 0.0f);
  std::fill_n(block.max, block.rows, -FLT_MAX);
  std::fill_n(block.sum, block.rows, 0.0f);
}

// scores[r, key + n] = q[r] . k[key + n] for kRows rows and kKeys keys; keys past `last` repeat the last one.
template <int kRows, int kKeys, class T>
inline void score_block(const float* q, int head_dim, const T* k, int64_t stride, int key, int last, float* scores) {
  Vec acc[kRows][kKeys];
  const T* row[kKeys];
  for (int n = 0; n < kKeys; ++n) {
    row[n] = k + std::min(key + n, last) * stride;
    for (int r = 0; r < kRows; ++r) acc[r][n] = Vec::fill(0.0f);
  }
  for (int x = 0; x < head_dim; x += Vec::kWidth) {
    Vec kx[kKeys];
    for (int n = 0; n < kKeys; ++n) kx[n] = Vec::load(row[n] + x);
    for (int r = 0; r < kRows; ++r) {
      const Vec qx = Vec::load(q + r * head_dim + x);
      for (int n = 0; n < kKeys; ++n) acc[r][n] = Vec::fma(qx, kx[n], acc[r][n]);
    }
  }
  constexpr int kPairs = kRows * kKeys / 2, kPairsPerRow = kKeys / 2;
  for (int pair = 0; pair < kPairs; pair += 2) {
    const int other = std::min(pair + 1, kPairs - 1);
    const int r = pair / kPairsPerRow, n = pair % kPairsPerRow * 2;
    const int r2 = other / kPairsPerRow, n2 = other % kPairsPerRow * 2;
    Vec::sum_pairs(acc[r][n], acc[r][n + 1], acc[r2][n2], acc[r2][n2 + 1], scores + r * kTileKeys + key + n,
                   scores + r2 * kTileKeys + key + n2);
  }
}

// out[r, x...] = decay[r] * out[r, x...] + sum over keys of scores[r, key] * v[key, x...], for kRows rows and kVecs registers.
template <int kRows, int kVecs, class T>
inline void value_block(const float* scores, const float* decay, const T* v, int64_t stride, TileInterval keys, float* out,
                        int head_dim) {
  Vec acc[kRows][kVecs];
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kVecs; ++c) acc[r][c] = Vec::load(out + r * head_dim + c * Vec::kWidth) * Vec::fill(decay[r]);
  }
  for (int key = keys.begin; key < keys.end; ++key) {
    Vec vx[kVecs];
    for (int c = 0; c < kVecs; ++c) vx[c] = Vec::load(v + key * stride + c * Vec::kWidth);
    for (int r = 0; r < kRows; ++r) {
      const Vec weight = Vec::fill(scores[r * kTileKeys + key]);
      for (int c = 0; c < kVecs; ++c) acc[r][c] = Vec::fma(weight, vx[c], acc[r][c]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kVecs; ++c) acc[r][c].store(out + r * head_dim + c * Vec::kWidth);
  }
}

template <int kRows, class T>
inline void score_rows(const RowBlock& block, int r, const T* k, int64_t stride, TileInterval keys) {
  constexpr int kKeys = kRows >= 3 ? 2 : kRows == 2 ? 4 : 8;  // registers: kRows * kKeys sums, kKeys keys, one query
  for (int key = keys.begin; key < keys.end; key += kKeys) {
    score_block<kRows, kKeys>(block.q + static_cast<int64_t>(r) * block.head_dim, block.head_dim, k, stride, key,
                              keys.end - 1, block.scores + r * kTileKeys);
  }
}

template <int kRows, class T>
inline void value_rows(const RowBlock& block, int r, const T* v, int64_t stride, TileInterval keys) {
  constexpr int kVecs = kRows >= 3 ? 2 : 4;
  float* out = block.out + static_cast<int64_t>(r) * block.head_dim;
  const float* scores = block.scores + r * kTileKeys;
  int x = 0;
  for (; x + kVecs * Vec::kWidth <= block.head_dim; x += kVecs * Vec::kWidth) {
    value_block<kRows, kVecs>(scores, block.decay + r, v + x, stride, keys, out + x, block.head_dim);
  }
  for (; x < block.head_dim; x += Vec::kWidth) {
    value_block<kRows, 1>(scores, block.decay + r, v + x, stride, keys, out + x, block.head_dim);
  }
}

// f(count, r, keys) for the rows in groups of up to four, count a compile-time constant; keys are those that any row of the
// group sees, their begin rounded down so that aligned registers and blocks of keys stay inside the tile.
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

// Turns the scores of the keys in [keys.begin, keys.end) into weights, 0 outside the row's own interval, and folds the tile
// into the row's maximum and sum.
inline void softmax_row(const RowBlock& block, int r, TileInterval keys) {
  const TileInterval seen = block.interval[r];
  float* scores = block.scores + r * kTileKeys;
  block.decay[r] = 1.0f;
  if (seen.begin >= seen.end) {
    std::fill(scores + keys.begin, scores + keys.end, 0.0f);
    return;
  }
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
template <class T>
inline void attend_tile(const RowBlock& block, const T* k, int64_t k_stride, const T* v, int64_t v_stride) {
  for_row_groups(block, [&](auto rows, int r, TileInterval keys) {
    score_rows<rows()>(block, r, k, k_stride, keys);
    for (int i = r; i < r + rows(); ++i) softmax_row(block, i, keys);
  });
  for_row_groups(block, [&](auto rows, int r, TileInterval keys) { value_rows<rows()>(block, r, v, v_stride, keys); });
}

}  // namespace zigzag::ZIGZAG_CPU_ISA
