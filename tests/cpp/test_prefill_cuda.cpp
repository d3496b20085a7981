// Prefill and append on the GPU against double precision on the CPU. Whatever a kernel must not read (unused slots,
// padding columns, gaps between rows) holds NaN, and whatever it must not write is compared bit for bit afterwards.
// Shapes are small, so that it can run under compute-sanitizer.
#if ZIGZAG_WITH_CUDA
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "cuda_testing.h"
#include "kernels/attention.h"
#include "kernels/prefill/prefill.h"

namespace zigzag {
namespace {

// [batch, heads, tokens, head_dim] in 16-bit elements, all NaN at first. `strided`: tokens before heads in memory, rows
// apart.
struct Tensor {
  std::vector<uint16_t> data;
  Strides stride;

  Tensor(int batch, int heads, int tokens, int head_dim, bool strided) {
    const int64_t row = head_dim + (strided ? 8 : 0), slab = static_cast<int64_t>(heads) * tokens * row;
    stride = strided ? Strides{slab, row, heads * row} : Strides{slab, tokens * row, row};
    data.assign(static_cast<size_t>(batch * slab), 0xffff);
  }
  uint16_t* row(int b, int h, int t) { return data.data() + b * stride.batch + h * stride.head + t * stride.token; }
};

struct Case {
  const char* name;
  std::vector<int> seq_lens;
  int q_len;
  int sink = 0, window = 0;  // window 0: full cache
  int group = 4, head_dim = 64;
  std::vector<int> pad = {};
  DType dtype = DType::kBFloat16;
  bool strided = false;
  bool cacheless = false;  // slots == 0
  int num_kv_heads = 2;
  float scale = 0.0f;  // 0: head_dim ** -0.5
  int slack = 0;       // slots of a ring beyond sink + window

  int batch() const { return static_cast<int>(seq_lens.size()); }
  int num_q_heads() const { return group * num_kv_heads; }
  int pad_of(int b) const { return pad.empty() ? 0 : std::clamp(pad[b], 0, q_len); }
  int slots() const {
    if (cacheless) return 0;
    return window > 0 ? sink + window + slack : *std::max_element(seq_lens.begin(), seq_lens.end()) + q_len + 1;
  }
  float logit_scale() const { return scale != 0.0f ? scale : 1.0f / std::sqrt(static_cast<float>(head_dim)); }
  int slot(int position) const {
    return window == 0 || position < sink ? position : sink + (position - sink) % (window + slack);
  }
  bool visible(int key, int query) const { return key <= query && (window == 0 || key < sink || key > query - window); }
};

struct Inputs {
  Tensor q, k_new, v_new, k_cache, v_cache;

  explicit Inputs(const Case& c)
      : q(c.batch(), c.num_q_heads(), c.q_len, c.head_dim, c.strided),
        k_new(c.batch(), c.num_kv_heads, c.q_len, c.head_dim, c.strided),
        v_new(k_new),
        k_cache(c.batch(), c.num_kv_heads, c.slots(), c.head_dim, c.strided),
        v_cache(k_cache) {
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    const auto fill = [&](uint16_t* row, float sigma) {
      for (int d = 0; d < c.head_dim; ++d) row[d] = encode(sigma * normal(random), c.dtype);
    };
    for (int b = 0; b < c.batch(); ++b) {
      for (int i = c.pad_of(b); i < c.q_len; ++i) {
        for (int h = 0; h < c.num_q_heads(); ++h) fill(q.row(b, h, i), 1.5f);
        for (int h = 0; h < c.num_kv_heads; ++h) fill(k_new.row(b, h, i), 1.0f), fill(v_new.row(b, h, i), 1.0f);
      }
      for (int key = 0; key < c.seq_lens[b] && !c.cacheless; ++key) {
        if (c.window > 0 && key >= c.sink && key < c.seq_lens[b] - c.window) continue;
        for (int h = 0; h < c.num_kv_heads; ++h)
          fill(k_cache.row(b, h, c.slot(key)), 1.0f), fill(v_cache.row(b, h, c.slot(key)), 1.0f);
      }
    }
  }
};

struct Expected {
  std::vector<double> out, lse;  // [batch, num_q_heads, q_len(, head_dim)]
};

// One query head of one column; keys of the cache are found by simulating the appends that filled it.
void attend(const Case& c, Inputs& in, int b, int head, int column, double* out, double* lse) {
  const int kv_head = head / c.group, length = c.seq_lens[b], pad = c.pad_of(b), query = length + column - pad;
  std::vector<const uint16_t*> k, v;
  const int oldest = c.window == 0 ? 0 : std::max(0, length - c.window);
  for (int key = 0; key < length && !c.cacheless; ++key) {
    if ((key >= c.sink && key < oldest) || !c.visible(key, query)) continue;
    k.push_back(in.k_cache.row(b, kv_head, c.slot(key)));
    v.push_back(in.v_cache.row(b, kv_head, c.slot(key)));
  }
  for (int i = pad; i <= column; ++i) {
    if (!c.visible(length + i - pad, query)) continue;
    k.push_back(in.k_new.row(b, kv_head, i));
    v.push_back(in.v_new.row(b, kv_head, i));
  }
  std::vector<double> logit(k.size());
  const uint16_t* q = in.q.row(b, head, column);
  for (size_t i = 0; i < k.size(); ++i) {
    for (int d = 0; d < c.head_dim; ++d) logit[i] += decode(q[d], c.dtype) * decode(k[i][d], c.dtype);
    logit[i] *= c.logit_scale();
  }
  const double top = *std::max_element(logit.begin(), logit.end());
  double sum = 0;
  for (double x : logit) sum += std::exp(x - top);
  *lse = top + std::log(sum);
  for (size_t i = 0; i < k.size(); ++i) {
    for (int d = 0; d < c.head_dim; ++d) out[d] += std::exp(logit[i] - *lse) * decode(v[i][d], c.dtype);
  }
}

Expected expected_attention(const Case& c, Inputs& in) {
  Expected e;
  const size_t rows = static_cast<size_t>(c.batch()) * c.num_q_heads() * c.q_len;
  e.out.assign(rows * c.head_dim, 0.0);
  e.lse.assign(rows, -std::numeric_limits<double>::infinity());
  for (size_t row = 0; row < rows; ++row) {
    const int column = static_cast<int>(row % c.q_len), head = static_cast<int>(row / c.q_len % c.num_q_heads());
    const int b = static_cast<int>(row / c.q_len / c.num_q_heads());
    if (column >= c.pad_of(b)) attend(c, in, b, head, column, &e.out[row * c.head_dim], &e.lse[row]);
  }
  return e;
}

// Tokens in order, later ones over earlier ones: what a ring holds afterwards needs no rule about survivors.
void expected_append(const Case& c, Inputs& in) {
  for (int b = 0; b < c.batch(); ++b) {
    for (int i = c.pad_of(b); i < c.q_len; ++i) {
      const int slot = c.slot(c.seq_lens[b] + i - c.pad_of(b));
      if (slot >= c.slots()) continue;
      for (int h = 0; h < c.num_kv_heads; ++h) {
        std::memcpy(in.k_cache.row(b, h, slot), in.k_new.row(b, h, i), 2 * c.head_dim);
        std::memcpy(in.v_cache.row(b, h, slot), in.v_new.row(b, h, i), 2 * c.head_dim);
      }
    }
  }
}

// The case's tensors on the device; out and lse start as NaN.
struct OnDevice {
  Tensor out_layout;
  DeviceArray<uint16_t> q, k_new, v_new, k_cache, v_cache, out;
  DeviceArray<float> lse;
  DeviceArray<int> seq_lens, pad;

  OnDevice(const Case& c, const Inputs& in)
      : out_layout(c.batch(), c.num_q_heads(), c.q_len, c.head_dim, c.strided),
        q(in.q.data),
        k_new(in.k_new.data),
        v_new(in.v_new.data),
        k_cache(in.k_cache.data),
        v_cache(in.v_cache.data),
        out(out_layout.data),
        lse(std::vector<float>(static_cast<size_t>(c.batch()) * c.num_q_heads() * c.q_len, NAN)),
        seq_lens(c.seq_lens),
        pad(c.pad) {}

  AttentionParams params(const Case& c, const Inputs& in) const {
    AttentionParams p = {};
    p.q = q.data(), p.k_new = k_new.data(), p.v_new = v_new.data();
    p.k_cache = c.cacheless ? nullptr : k_cache.data(), p.v_cache = c.cacheless ? nullptr : v_cache.data();
    p.out = out.data(), p.lse = lse.data(), p.seq_lens = seq_lens.data();
    p.pad = c.pad.empty() ? nullptr : pad.data();
    p.q_stride = in.q.stride, p.k_new_stride = in.k_new.stride, p.v_new_stride = in.v_new.stride;
    p.k_cache_stride = in.k_cache.stride, p.v_cache_stride = in.v_cache.stride, p.out_stride = out_layout.stride;
    p.batch = c.batch(), p.num_q_heads = c.num_q_heads(), p.num_kv_heads = c.num_kv_heads;
    p.q_len = c.q_len, p.head_dim = c.head_dim, p.slots = c.slots(), p.sink = c.sink, p.window = c.window;
    p.scale = c.logit_scale(), p.dtype = c.dtype;
    return p;
  }
};

void check_cache(const Case& c, Inputs& in, const OnDevice& device) {
  expected_append(c, in);
  CHECK(device.k_cache.host() == in.k_cache.data);
  CHECK(device.v_cache.host() == in.v_cache.data);
}

void check_attention(const Case& c, const Expected& e, const OnDevice& device) {
  Tensor out = device.out_layout;
  out.data = device.out.host();
  const std::vector<float> lse = device.lse.host();
  // Rounding of the weights and of the output: a few units of 2^-9 (bf16) or 2^-12 (fp16) of the row's norm.
  const double limit = c.dtype == DType::kBFloat16 ? 7e-3 : 1e-3;
  double worst_out = 0, worst_lse = 0;
  bool padding_ok = true;
  for (size_t row = 0; row < lse.size(); ++row) {
    const int column = static_cast<int>(row % c.q_len), head = static_cast<int>(row / c.q_len % c.num_q_heads());
    const int b = static_cast<int>(row / c.q_len / c.num_q_heads());
    const uint16_t* actual = out.row(b, head, column);
    if (column < c.pad_of(b)) {
      padding_ok =
          padding_ok && lse[row] == -INFINITY && std::all_of(actual, actual + c.head_dim, [](int x) { return x == 0; });
      continue;
    }
    double error = 0, norm = 0;
    for (int d = 0; d < c.head_dim; ++d) {
      const double x = e.out[row * c.head_dim + d];
      error += std::pow(decode(actual[d], c.dtype) - x, 2), norm += x * x;
    }
    const double relative = std::sqrt(error / norm), lse_error = std::abs(lse[row] - e.lse[row]);
    if (!(relative <= worst_out)) worst_out = relative;  // keeps NaN
    if (!(lse_error <= worst_lse)) worst_lse = lse_error;
    std::fill(out.row(b, head, column), out.row(b, head, column) + c.head_dim, static_cast<uint16_t>(0xffff));
  }
  CHECK(worst_out <= limit);
  CHECK(worst_lse <= 5e-4);
  CHECK(padding_ok);
  if (c.pad.empty()) CHECK(out.data == device.out_layout.data);  // nothing written between the rows
}

void check_prefill(const Case& c) {
  INFO(c.name, ": q_len ", c.q_len, " sink ", c.sink, " window ", c.window, " group ", c.group, " head_dim ",
       c.head_dim, " first seq_len ", c.seq_lens[0], " ", name(c.dtype));
  Inputs in(c);
  const Expected e = expected_attention(c, in);
  const OnDevice device(c, in);
  prefill_cuda(device.params(c, in), nullptr);
  CHECK_CUDA(cudaDeviceSynchronize());
  check_attention(c, e, device);
  check_cache(c, in, device);
}

AppendParams append_params(const AttentionParams& a) {
  AppendParams p = {};
  p.k_new = a.k_new, p.v_new = a.v_new, p.k_cache = a.k_cache, p.v_cache = a.v_cache;
  p.seq_lens = a.seq_lens, p.pad = a.pad;
  p.k_new_stride = a.k_new_stride, p.v_new_stride = a.v_new_stride;
  p.k_cache_stride = a.k_cache_stride, p.v_cache_stride = a.v_cache_stride;
  p.batch = a.batch, p.num_kv_heads = a.num_kv_heads, p.q_len = a.q_len, p.head_dim = a.head_dim;
  p.slots = a.slots, p.sink = a.sink, p.window = a.window, p.dtype = a.dtype;
  return p;
}

}  // namespace

TEST_CASE("prefill over a full cache equals the double reference") {
  if (no_device()) return;
  const std::vector<Case> cases = {
      {"first chunk", {0}, 17},
      {"exactly one tile", {0}, 32},
      {"several tiles, diagonal inside a tile", {0}, 150},
      {"ragged batch", {0, 1, 63, 64, 200}, 40},
      {"continued", {130}, 90, 0, 0, 1},
      {"keys of the cache, of both, and of the chunk", {300, 256, 3}, 280, 0, 0, 1, 128},
      {"the same in one group, padded", {300, 250}, 200, 0, 0, 7, 64, {1, 64}, DType::kFloat16, true},
      {"padded rows, one of them all padding", {0, 70, 5}, 33, 0, 0, 4, 64, {0, 7, 33}},
      {"whole tiles of padding", {10, 0}, 100, 0, 0, 4, 64, {90, 0}},
      {"one token", {77, 0}, 1},
      {"strided", {20, 64}, 50, 0, 0, 3, 64, {4, 0}, DType::kFloat16, true},
      {"no cache", {0, 0}, 70, 0, 0, 4, 64, {0, 3}, DType::kFloat16, false, true},
      {"negative scale", {30}, 20, 0, 0, 2, 64, {}, DType::kFloat16, false, false, 2, -0.2f},
  };
  for (const Case& c : cases) check_prefill(c);
}

TEST_CASE("prefill over a ring equals the double reference") {
  if (no_device()) return;
  const std::vector<Case> cases = {
      {"chunk fills sink and window and wraps", {0}, 100, 4, 16},
      {"sink partly cached", {2}, 40, 4, 16},
      {"sink just cached, ring filling", {4, 5, 19, 20, 21}, 18, 4, 16},
      {"long past", {1000, 1003, 1015}, 50, 4, 16},
      {"chunk shorter than the window", {40, 300}, 20, 8, 64},
      {"no sink", {0, 3, 64, 65}, 70, 0, 64},
      {"window of one token", {0, 7}, 40, 3, 1},
      {"window larger than everything", {10}, 50, 4, 500},
      {"sink larger than everything", {10}, 50, 400, 8},
      {"sink ends inside the chunk", {30}, 60, 64, 32},
      {"padded", {0, 3, 21, 100}, 30, 4, 16, 4, 64, {5, 30, 0, 11}},
      {"padded, more tokens than the ring", {0, 3, 100}, 90, 4, 16, 4, 64, {80, 89, 1}},
      {"default sizes", {0, 63, 320, 5000}, 300, 64, 256, 4, 128, {}, DType::kBFloat16, false, false, 1},
      {"strided", {18, 64}, 50, 4, 16, 3, 80, {4, 0}, DType::kFloat16, true},
      {"no cache", {0, 50}, 70, 4, 16, 4, 64, {0, 3}, DType::kFloat16, false, true},
  };
  for (const Case& c : cases) check_prefill(c);
}

TEST_CASE("prefill over a ring with slack reads nothing outside the window") {
  if (no_device()) return;
  for (const int slack : {1, 5, 20, 3000}) {
    for (Case c :
         std::vector<Case>{{"chunk fills sink and window and wraps", {0}, 100, 4, 16},
                           {"ring filling and wrapping", {2, 4, 19, 20, 21, 25, 40, 41}, 18, 4, 16},
                           {"chunk shorter than the window", {40, 300}, 20, 8, 64},
                           {"window of one token", {0, 7}, 40, 3, 1},
                           {"padded, also beyond the chunk", {0, 3, 21, 100}, 30, 4, 16, 4, 64, {5, 30, -2, 99}},
                           {"default sizes", {0, 330, 5000}, 300, 64, 256, 4, 128}}) {
      c.slack = slack;
      check_prefill(c);
    }
  }
}

TEST_CASE("prefill serves every group size and head_dim") {
  if (no_device()) return;
  for (int head_dim : kHeadDims) {
    for (int group : {1, 3, 7, 16}) {
      for (DType dtype : {DType::kBFloat16, DType::kFloat16}) {
        check_prefill({"full", {33, 0}, 45, 0, 0, group, head_dim, {0, 2}, dtype});
        check_prefill({"ring", {33, 2}, 45, 5, 20, group, head_dim, {0, 2}, dtype});
      }
    }
  }
}

TEST_CASE("prefill serves any small q_len and any place in the ring") {
  if (no_device()) return;
  for (int q_len : {1, 2, 16, 17, 65}) {
    for (int length : {0, 1, 5, 11, 12, 13, 29}) {
      check_prefill({"full", {length}, q_len, 0, 0, 2});
      check_prefill({"ring", {length}, q_len, 5, 7, 2});
    }
  }
}

TEST_CASE("prefill can be captured in a CUDA graph, and a replay reads the lengths of its time") {
  if (no_device()) return;
  const Case c = {"graph", {40, 70}, 30, 4, 48, 4, 128};
  Inputs in(c);
  const Expected e = expected_attention(c, in);
  const OnDevice device(c, in);
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t replay;
  CHECK_CUDA(cudaStreamCreate(&stream));
  CHECK_CUDA(cudaMemset(device.seq_lens.data(), 0, 2 * sizeof(int)));
  CHECK_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  prefill_cuda(device.params(c, in), stream);
  CHECK_CUDA(cudaStreamEndCapture(stream, &graph));
  CHECK_CUDA(cudaGraphInstantiate(&replay, graph, 0));
  CHECK_CUDA(cudaMemcpy(device.seq_lens.data(), c.seq_lens.data(), 2 * sizeof(int), cudaMemcpyHostToDevice));
  CHECK_CUDA(cudaGraphLaunch(replay, stream));
  CHECK_CUDA(cudaStreamSynchronize(stream));
  check_attention(c, e, device);
  check_cache(c, in, device);
  CHECK_CUDA(cudaGraphExecDestroy(replay));
  CHECK_CUDA(cudaGraphDestroy(graph));
  CHECK_CUDA(cudaStreamDestroy(stream));
}

TEST_CASE("append writes what survives and nothing else") {
  if (no_device()) return;
  const std::vector<Case> cases = {
      {"full", {0, 9}, 40},
      {"ring, shorter than the ring", {0, 3, 100}, 19, 4, 16},
      {"ring, exactly the ring", {0, 3, 100}, 20, 4, 16},
      {"ring, one more", {0, 3, 100}, 21, 4, 16},
      {"ring, much longer, padded", {0, 3, 100, 2}, 500, 4, 16, 1, 80, {0, 499, 490, 500}, DType::kFloat16, true},
      {"ring, no sink", {5}, 300, 0, 7, 1, 256},
      {"ring, sink longer than the chunk", {5}, 300, 400, 7, 1, 96},
      {"ring, padding beyond the chunk", {5, 5}, 30, 4, 16, 1, 64, {-4, 31}},
  };
  for (int i = 0; i < 2 * static_cast<int>(cases.size()); ++i) {
    Case c = cases[i / 2];
    c.slack = i % 2 * 6;
    INFO(c.name, " slack ", c.slack);
    Inputs in(c);
    const OnDevice device(c, in);
    append_cuda(append_params(device.params(c, in)), nullptr);
    CHECK_CUDA(cudaDeviceSynchronize());
    check_cache(c, in, device);
  }
}

TEST_CASE("append skips tokens past the capacity") {
  if (no_device()) return;
  const Case c = {"full", {6}, 20};
  Inputs in(c);
  const OnDevice device(c, in);
  AppendParams p = append_params(device.params(c, in));
  p.slots = 10;
  append_cuda(p, nullptr);
  CHECK_CUDA(cudaDeviceSynchronize());
  for (int h = 0; h < c.num_kv_heads; ++h) {
    for (int slot = 6; slot < 10; ++slot)
      std::memcpy(in.k_cache.row(0, h, slot), in.k_new.row(0, h, slot - 6), 2 * c.head_dim);
  }
  CHECK(device.k_cache.host() == in.k_cache.data);
}

}  // namespace zigzag
#endif
