// A call that serves some KV heads of a layer against the call on tensors of those heads alone: the same bits, and
// nothing else read (other heads hold NaN) or written. What the latter computes is tested elsewhere.
#if ZIGZAG_WITH_CUDA
#include <random>

#include "core/error.h"
#include "cuda_testing.h"
#include "kernels/attention.h"

namespace zigzag {
namespace {

constexpr int kTotal = 5, kHeadDim = 64;
const std::vector<int32_t> kServed = {3, 0, 4};
constexpr DType kDType = DType::kBFloat16;
constexpr uint16_t kNan = 0xffff;

struct HeadsCase {
  int group, q_len, sink, window;
  std::vector<int32_t> seq_lens, pad;
  int rotary_dim = 0;

  int batch() const { return static_cast<int>(seq_lens.size()); }
  int slots() const { return window > 0 ? sink + window : *std::max_element(seq_lens.begin(), seq_lens.end()) + q_len; }
};

// [batch, heads, tokens, kHeadDim], contiguous.
using Rows = std::vector<uint16_t>;

Rows random_rows(int batch, int heads, int tokens, std::mt19937& random) {
  std::normal_distribution<float> normal;
  Rows rows(static_cast<size_t>(batch) * heads * tokens * kHeadDim);
  for (uint16_t& x : rows) x = encode(normal(random), kDType);
  return rows;
}

// The same rows among kTotal * group heads, the others of which are NaN.
Rows spread(const Rows& rows, int batch, int group, int tokens) {
  const int served = static_cast<int>(kServed.size()) * group;
  const size_t head_size = static_cast<size_t>(tokens) * kHeadDim;
  Rows all(batch * kTotal * group * head_size, kNan);
  for (int b = 0; b < batch; ++b) {
    for (int head = 0; head < served; ++head) {
      const int target = kServed[head / group] * group + head % group;
      std::copy_n(&rows[(b * served + head) * head_size], head_size,
                  &all[(static_cast<size_t>(b) * kTotal * group + target) * head_size]);
    }
  }
  return all;
}

Strides contiguous(int heads, int tokens) {
  return {static_cast<int64_t>(heads) * tokens * kHeadDim, static_cast<int64_t>(tokens) * kHeadDim, kHeadDim};
}

struct Result {
  Rows out, k_cache, v_cache;
  std::vector<float> lse;
};

struct Inputs {
  Rows q, k_new, v_new, k_cache, v_cache;
  std::vector<float> table;  // cosines and sines alike
};

Result run(const HeadsCase& c, const Inputs& in, int total, const int32_t* heads) {
  const int served = static_cast<int>(kServed.size());
  const DeviceArray<uint16_t> q(in.q), k_new(in.k_new), v_new(in.v_new), k_cache(in.k_cache), v_cache(in.v_cache);
  const DeviceArray<uint16_t> out(Rows(in.q.size(), kNan));
  const DeviceArray<float> lse(std::vector<float>(in.q.size() / kHeadDim, 7.0f)), table(in.table);
  const DeviceArray<int32_t> seq_lens(c.seq_lens), pad(c.pad);
  const int64_t bytes = attention_workspace_bytes();
  const DeviceArray<char> workspace(std::vector<char>(bytes, 0));
  AttentionParams p = {};
  p.q = q.data(), p.k_new = k_new.data(), p.v_new = v_new.data();
  p.k_cache = k_cache.data(), p.v_cache = v_cache.data(), p.out = out.data(), p.lse = lse.data();
  p.seq_lens = seq_lens.data(), p.pad = pad.data();
  p.workspace = workspace.data(), p.workspace_bytes = bytes;
  p.q_stride = p.out_stride = contiguous(total * c.group, c.q_len);
  p.k_new_stride = p.v_new_stride = contiguous(total, c.q_len);
  p.k_cache_stride = p.v_cache_stride = contiguous(served, c.slots());
  p.batch = c.batch(), p.num_q_heads = served * c.group, p.num_kv_heads = served;
  p.q_len = c.q_len, p.head_dim = kHeadDim;
  p.slots = c.slots(), p.sink = c.sink, p.window = c.window, p.scale = 0.125f, p.dtype = kDType;
  p.heads = {heads, total};
  if (c.rotary_dim > 0) {
    const int64_t row = static_cast<int64_t>(c.q_len) * c.rotary_dim;
    p.rotary = {table.data(), table.data(), row, c.rotary_dim, row, c.rotary_dim, c.rotary_dim, DType::kFloat32};
  }
  attention_cuda(p, nullptr);
  CHECK_CUDA(cudaDeviceSynchronize());
  return {out.host(), k_cache.host(), v_cache.host(), lse.host()};
}

void check_case(const HeadsCase& c) {
  const int served = static_cast<int>(kServed.size());
  INFO(concat("group ", c.group, " q_len ", c.q_len, " sink ", c.sink, " window ", c.window, " rows ", c.batch(),
              " rotary_dim ", c.rotary_dim));
  std::mt19937 random(5);
  Inputs alone;
  alone.q = random_rows(c.batch(), served * c.group, c.q_len, random);
  alone.k_new = random_rows(c.batch(), served, c.q_len, random);
  alone.v_new = random_rows(c.batch(), served, c.q_len, random);
  alone.k_cache = random_rows(c.batch(), served, c.slots(), random);
  alone.v_cache = random_rows(c.batch(), served, c.slots(), random);
  std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
  for (int i = 0; i < c.batch() * c.q_len * c.rotary_dim; ++i) alone.table.push_back(uniform(random));

  Inputs among = alone;
  among.q = spread(alone.q, c.batch(), c.group, c.q_len);
  among.k_new = spread(alone.k_new, c.batch(), 1, c.q_len);
  among.v_new = spread(alone.v_new, c.batch(), 1, c.q_len);

  const DeviceArray<int32_t> heads(kServed);
  const Result expected = run(c, alone, served, nullptr), found = run(c, among, kTotal, heads.data());
  CHECK(found.out == spread(expected.out, c.batch(), c.group, c.q_len));
  CHECK(found.k_cache == expected.k_cache);
  CHECK(found.v_cache == expected.v_cache);
  int wrong = 0;
  for (int b = 0; b < c.batch(); ++b) {
    for (int head = 0; head < kTotal * c.group; ++head) {
      const auto at = std::find(kServed.begin(), kServed.end(), head / c.group);
      const int64_t own = (at - kServed.begin()) * c.group + head % c.group;
      for (int column = 0; column < c.q_len; ++column) {
        const float value = found.lse[(static_cast<size_t>(b) * kTotal * c.group + head) * c.q_len + column];
        wrong += value != (at == kServed.end() ? 7.0f : expected.lse[(b * served * c.group + own) * c.q_len + column]);
      }
    }
  }
  CHECK(wrong == 0);
}

const std::vector<int32_t> kMany(40, 33);  // so many rows that no cluster is launched

}  // namespace

TEST_CASE("heads of a layer: a decode step equals that on their tensors alone") {
  if (no_device()) return;
  for (const int group : {1, 4, 7}) {
    for (const int rotary_dim : {0, 32}) {
      for (const int q_len : {1, 3, 16}) {
        for (const auto& [sink, window] : {std::pair(0, 0), std::pair(4, 60), std::pair(64, 256)}) {
          check_case({group, q_len, sink, window, {700}, {0}, rotary_dim});
          check_case({group, q_len, sink, window, {0, 90, 1000}, {0, q_len, 1}, rotary_dim});
        }
      }
    }
  }
}

TEST_CASE("heads of a layer: a decode step of many rows equals that on their tensors alone") {
  if (no_device()) return;
  for (const int q_len : {1, 4}) {
    for (const int window : {0, 60}) check_case({4, q_len, 4, window, kMany, std::vector<int32_t>(kMany.size(), 0)});
  }
}

TEST_CASE("heads of a layer: a prompt equals that on their tensors alone") {
  if (no_device()) return;
  for (const int group : {1, 4, 7}) {
    for (const int window : {0, 60}) check_case({group, 150, 4, window, {0, 90, 300}, {0, 100, 1}});
  }
}

}  // namespace zigzag
#endif
