// How many slots a cache has and how many bytes it takes: the one place that knows. The scheduler, the solver's budgets
// and the Python package ask here.
#pragma once

#include <initializer_list>

#include "core/error.h"
#include "core/layer_kind.h"
#include "core/types.h"

namespace zigzag {

// Slots per KV head in a context of at most `max_len` tokens. A ring has all its slots from the start; `rollback` of
// them keep tokens that left the window, so that as many of the newest ones can be taken back.
inline int64_t cache_slots(LayerKind kind, int64_t sink, int64_t window, int64_t rollback, int64_t max_len) {
  ZZ_CHECK(sink >= 0 && window >= 0 && rollback >= 0 && max_len >= 0,
           "sink, window, rollback and max_len must be >= 0 tokens, got sink ", sink, ", window ", window,
           ", rollback ", rollback, " and max_len ", max_len);
  return kind == LayerKind::kState ? 0 : is_ring(kind) ? sink + window + rollback : max_len;
}

// Keys and values of some KV heads of one layer.
struct KvShape {
  int64_t num_kv_heads;
  int64_t slots;                // per head
  int64_t head_dim, value_dim;  // elements of a key and of a value
  int64_t element_bytes;        // of the model's dtype
  KvFormats formats;
};

namespace detail {

inline int64_t checked_product(std::initializer_list<int64_t> factors) {
  int64_t product = 1;
  for (const int64_t factor : factors) {
    ZZ_CHECK(!__builtin_mul_overflow(product, factor, &product), "the caches would take more than 2^63 bytes");
  }
  return product;
}

inline int64_t checked_sum(int64_t a, int64_t b) {
  int64_t sum = 0;
  ZZ_CHECK(!__builtin_add_overflow(a, b, &sum), "the caches would take more than 2^63 bytes");
  return sum;
}

}  // namespace detail

// Bytes of keys, values and their scales for `batch` rows, without what an allocator rounds up. Throws zigzag::Error on
// a negative size, and where the bytes do not fit 63 bits, so that no wrapped count reaches an allocator.
inline int64_t kv_bytes(const KvShape& shape, int64_t batch) {
  ZZ_CHECK(batch >= 0 && shape.num_kv_heads >= 0 && shape.slots >= 0,
           "batch, KV heads and slots must be >= 0, got batch ", batch, ", ", shape.num_kv_heads, " KV heads and ",
           shape.slots, " slots");
  constexpr int64_t kMost = int64_t{1} << 30;
  for (const int64_t size : {shape.head_dim, shape.value_dim, shape.element_bytes}) {
    ZZ_CHECK(size >= 1 && size < kMost, "head_dim, value_dim and element_bytes must lie in [1, 2^30), got ",
             shape.head_dim, ", ", shape.value_dim, " and ", shape.element_bytes);
  }
  const int64_t pair_bytes = vector_bytes(shape.formats.k, shape.element_bytes, shape.head_dim) +
                             vector_bytes(shape.formats.v, shape.element_bytes, shape.value_dim) +
                             scale_bytes(shape.formats.k) + scale_bytes(shape.formats.v);
  return detail::checked_product({batch, shape.num_kv_heads, pair_bytes, shape.slots});
}

}  // namespace zigzag
