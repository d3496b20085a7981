// One cell of a benchmark: a shape, its buffers, the check of its output, its rows of results.
#pragma once

#include <string>
#include <vector>

#include "device.h"
#include "kv/ring.h"
#include "table.h"

namespace zigzag::bench {

struct Cell {
  std::string scenario;
  DType dtype;
  int num_q_heads, num_kv_heads, head_dim, q_len;
  int sink, window;           // window == 0: full cache
  bool rope;                  // the op rotates queries and keys itself, tables in the element type
  std::vector<int> kv_lens;   // per row: keys that the last new token attends
  std::vector<int> seq_lens;  // per row: tokens cached before the call
  bool token_major =
      false;  // caches [batch, slots, heads, head_dim] in memory instead of [batch, heads, slots, head_dim]
  KvFormat kv_format = KvFormat::kPlain;  // of keys and values
  int slack = 0;                          // slots of a ring beyond sink + window

  int batch() const { return static_cast<int>(kv_lens.size()); }
  int slots() const;
  int64_t kv_bytes() const;       // K and V of all attended keys, their scales included, read once
  Strides cache_strides() const;  // of elements or codes
  Strides scale_strides() const;

 private:
  Strides strides(int row) const;
};

// Copies of the op's arguments at different addresses, as many as it takes to span kColdBytes: rotating through them
// finds the caches cold. Inputs are random and normal; slots past the cached tokens hold random numbers too. Quantised
// caches repeat a few thousand vectors.
class Problem {
 public:
  Problem(Device& device, const Cell& cell);

  int num_sets() const { return static_cast<int>(params_.size()); }
  const AttentionParams& params(int set) const { return params_[static_cast<std::size_t>(set)]; }

 private:
  // `vectors` random vectors as codes, then their scales, in one buffer.
  char* random_codes(Device& device, const Cell& cell, int64_t vectors);

  std::vector<std::shared_ptr<void>> buffers_;
  std::vector<AttentionParams> params_;
};

// Keys or values of one KV head: the cache as it was before the op, and the new tokens.
struct HeadTokens {
  std::vector<char> cached, fresh;
  DType dtype;  // of what is attended; the values of codes are float32
};

// Compares sampled heads of an op with attention in double precision. Made before the op runs: it keeps a copy of what
// the samples' caches hold by then.
class Check {
 public:
  Check(Device& device, const Cell& cell, const AttentionParams& params);

  // After the op: the largest ||out - expected|| / ||expected|| over the sampled heads. Throws if that, the log-sum-exp
  // or the appended keys and values are off.
  double worst_error();

 private:
  struct Sample {
    int row, head;
    HeadTokens k, v;
  };
  Device& device_;
  AttentionParams params_;
  std::vector<int> seq_lens_;
  std::vector<Sample> samples_;
};

// Copy bandwidth (bytes read + bytes written) and pure-read bandwidth of this machine, in GB/s, over 2 x 1 GB.
struct Bandwidth {
  double copy, read;
};
Bandwidth measure_bandwidth(Device& device);

// How results name the type of the caches.
const char* kv_format(const Cell& cell);

// Checks, times and reports the cell: one row for the op, one (impl "read") for a pure read of the same bytes.
void run_cell(Device& device, const Cell& cell, const Bandwidth& bandwidth, Table& table);

}  // namespace zigzag::bench
