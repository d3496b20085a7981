// A call with cache_rows against the call on caches of those rows alone, in order: the same bits, and nothing of other
// rows read (they hold NaN) or written. What the latter computes is tested elsewhere.
#if ZIGZAG_WITH_CUDA
#include <cstring>
#include <random>

#include "core/error.h"
#include "cuda_testing.h"
#include "kernels/attention.h"
#include "kv/ring.h"

namespace zigzag {
namespace {

constexpr int kHeads = 2, kGroup = 4, kHeadDim = 64, kCacheRows = 7;
constexpr DType kDType = DType::kBFloat16;

struct RowsCase {
  int q_len, slots, sink, window;
  KvFormat format;
  std::vector<int32_t> rows, lengths, pad;  // by batch row: its cache row or a number that does not exist, its length
};

bool is_served(int row) { return row >= 0 && row < kCacheRows; }

// Bytes of [rows, kHeads, slots] vectors, in which every byte is 0xff but what a row of the case holds.
struct Caches {
  std::vector<uint8_t> k, v;
  std::vector<float> k_scale, v_scale;
  std::vector<int32_t> lengths;

  Caches(int rows, int slots, int vector)
      : k(static_cast<size_t>(rows) * kHeads * slots * vector, 0xff),
        v(k),
        k_scale(static_cast<size_t>(rows) * kHeads * slots, NAN),
        v_scale(k_scale),
        lengths(rows, 1 << 30) {}
};

template <class T>
void copy_row(const std::vector<T>& from, int from_row, std::vector<T>& to, int to_row, int rows) {
  const size_t size = from.size() / rows;
  std::copy_n(&from[from_row * size], size, &to[to_row * (size)]);
}

struct Result {
  std::vector<uint16_t> out;
  std::vector<float> lse;
  Caches caches;
};

Result run(const RowsCase& c, int cache_rows, const int32_t* map, const std::vector<int32_t>& pad, const Caches& caches,
           const std::vector<uint16_t>& q, const std::vector<uint16_t>& fresh) {
  const int batch = static_cast<int>(c.rows.size()), q_heads = kHeads * kGroup;
  const bool plain = c.format == KvFormat::kPlain;
  const int vector = static_cast<int>(vector_bytes(c.format, kDType, kHeadDim)) / (plain ? 2 : 1);
  const DeviceArray<uint16_t> d_q(q), d_new(fresh), d_out(std::vector<uint16_t>(q.size(), 0xffff));
  const DeviceArray<uint8_t> d_k(caches.k), d_v(caches.v);
  const DeviceArray<float> d_k_scale(caches.k_scale), d_v_scale(caches.v_scale);
  const DeviceArray<float> d_lse(std::vector<float>(q.size() / kHeadDim, NAN));
  const DeviceArray<int32_t> d_lens(caches.lengths), d_pad(pad);
  const int64_t bytes = attention_workspace_bytes();
  const DeviceArray<char> workspace(std::vector<char>(static_cast<size_t>(bytes), 0));
  const auto strides = [](int heads, int tokens, int row) {
    return Strides{static_cast<int64_t>(heads) * tokens * row, static_cast<int64_t>(tokens) * row, row};
  };
  AttentionParams p = {};
  p.q = d_q.data(), p.k_new = p.v_new = d_new.data(), p.k_cache = d_k.data(), p.v_cache = d_v.data();
  p.out = d_out.data(), p.lse = d_lse.data(), p.seq_lens = d_lens.data(), p.pad = d_pad.data();
  p.workspace = workspace.data(), p.workspace_bytes = bytes;
  p.q_stride = p.out_stride = strides(q_heads, c.q_len, kHeadDim);
  p.k_new_stride = p.v_new_stride = strides(kHeads, c.q_len, kHeadDim);
  p.k_cache_stride = p.v_cache_stride = strides(kHeads, c.slots, vector);
  if (!plain) {
    p.k_store = {c.format, d_k_scale.data(), strides(kHeads, c.slots, 1)};
    p.v_store = {c.format, d_v_scale.data(), strides(kHeads, c.slots, 1)};
  }
  p.batch = batch, p.num_q_heads = q_heads, p.num_kv_heads = kHeads, p.q_len = c.q_len, p.head_dim = kHeadDim;
  p.slots = c.slots, p.sink = c.sink, p.window = c.window, p.scale = 0.125f, p.dtype = kDType;
  if (map != nullptr) p.cache_rows = {map, cache_rows};
  attention_cuda(p, nullptr);
  CHECK_CUDA(cudaDeviceSynchronize());
  Result result = {d_out.host(), d_lse.host(), caches};
  result.caches.k = d_k.host(), result.caches.v = d_v.host();
  result.caches.k_scale = d_k_scale.host(), result.caches.v_scale = d_v_scale.host();
  return result;
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

void check_case(const RowsCase& c) {
  const int batch = static_cast<int>(c.rows.size());
  INFO(concat("q_len ", c.q_len, " slots ", c.slots, " sink ", c.sink, " window ", c.window, " ", name(c.format),
              " rows ", batch, " first ", c.rows[0], " length ", c.lengths[0]));
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  const auto elements = [&](size_t count) {
    std::vector<uint16_t> x(count);
    for (uint16_t& y : x) y = encode(normal(random), kDType);
    return x;
  };
  const size_t token = static_cast<size_t>(batch) * kHeads * c.q_len * kHeadDim;
  const std::vector<uint16_t> q = elements(token * kGroup), fresh = elements(token);
  const int vector = static_cast<int>(vector_bytes(c.format, kDType, kHeadDim));
  Caches dense(batch, c.slots, vector), spread(kCacheRows, c.slots, vector);
  std::vector<int32_t> dense_pad = c.pad;
  for (int b = 0; b < batch; ++b) {
    dense.lengths[b] = is_served(c.rows[b]) ? c.lengths[b] : 0;
    if (!is_served(c.rows[b])) {
      dense_pad[b] = c.q_len;
      continue;
    }
    const RingLayout layout = {c.sink, c.window, c.slots};
    for (int i = b * kHeads * c.slots; i < (b + 1) * kHeads * c.slots; ++i) {
      if (layout.position(i % c.slots, c.lengths[b]) < 0) continue;
      for (std::vector<uint8_t>* side : {&dense.k, &dense.v}) {
        uint8_t* to = side->data() + static_cast<size_t>(i) * vector;
        const std::vector<uint16_t> x = elements(kHeadDim);
        if (c.format == KvFormat::kPlain) std::memcpy(to, x.data(), vector);
        for (int d = 0; c.format != KvFormat::kPlain && d < vector; ++d) to[d] = static_cast<uint8_t>(random() % 0x70);
      }
      dense.k_scale[i] = 0.02f, dense.v_scale[i] = 0.03f;
    }
  }
  const auto place = [&](const Caches& from, Caches& to) {
    for (int b = 0; b < batch; ++b) {
      if (!is_served(c.rows[b])) continue;
      copy_row(from.k, b, to.k, c.rows[b], batch), copy_row(from.v, b, to.v, c.rows[b], batch);
      copy_row(from.k_scale, b, to.k_scale, c.rows[b], batch), copy_row(from.v_scale, b, to.v_scale, c.rows[b], batch);
      to.lengths[c.rows[b]] = from.lengths[b];
    }
  };
  place(dense, spread);
  const DeviceArray<int32_t> map(c.rows);
  const Result expected = run(c, batch, nullptr, dense_pad, dense, q, fresh);
  const Result found = run(c, kCacheRows, map.data(), c.pad, spread, q, fresh);
  Caches wanted = spread;
  place(expected.caches, wanted);
  CHECK(same_bits(found.out, expected.out));
  CHECK(same_bits(found.lse, expected.lse));
  CHECK(same_bits(found.caches.k, wanted.k));
  CHECK(same_bits(found.caches.v, wanted.v));
  CHECK(same_bits(found.caches.k_scale, wanted.k_scale));
  CHECK(same_bits(found.caches.v_scale, wanted.v_scale));
  for (int b = 0; b < batch; ++b) {
    const size_t size = found.out.size() / batch;
    if (is_served(c.rows[b])) continue;
    CHECK(std::all_of(&found.out[b * size], &found.out[b * size] + size, [](uint16_t x) { return x == 0; }));
    CHECK(found.lse[b * size / kHeadDim] == -INFINITY);
  }
}

constexpr KvFormat kFormats[] = {KvFormat::kPlain, KvFormat::kFp8, KvFormat::kInt8, KvFormat::kInt4};

}  // namespace

TEST_CASE("cache rows: any subset and order equals the rows alone, skipped ones are left alone") {
  if (no_device()) return;
  for (const KvFormat format : kFormats) {
    for (const int q_len : {1, 3, 16, 40}) {
      for (const auto& [slots, sink, window] : {std::tuple(200, 0, 0), std::tuple(40, 4, 36)}) {
        check_case({q_len, slots, sink, window, format, {5}, {120}, {0}});
        check_case({q_len, slots, sink, window, format, {-1}, {0}, {0}});
        check_case({q_len, slots, sink, window, format, {3, -1, 0, 6, 7}, {33, 0, 0, 150, 0}, {0, 0, q_len, 1, 0}});
        check_case({q_len,
                    slots,
                    sink,
                    window,
                    format,
                    {6, 5, 4, 3, 2, 1, 0},
                    {0, 1, 16, 17, 39, 40, 41},
                    {0, 0, 0, 1, 0, 0, q_len}});
      }
    }
  }
}

TEST_CASE("cache rows: rings with slack, listed by position in both calls") {
  if (no_device()) return;
  for (const KvFormat format : kFormats) {
    for (const int q_len : {1, 3, 40}) {
      check_case({q_len, 300, 4, 36, format, {3, -1, 0, 6}, {33, 0, 0, 150}, {0, 0, 0, 1}});
    }
  }
}

}  // namespace zigzag
#endif
