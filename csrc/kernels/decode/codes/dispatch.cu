// Attention over quantised caches on CUDA: the choice of kernel, and chunks in parts.
#include <algorithm>

#include "core/error.h"
#include "kernels/attention.h"
#include "kernels/decode/codes/dispatch.h"
#include "kernels/prefill/prefill.h"
#include "kv/formats.h"

namespace zigzag {
namespace decode_full {
template <class KFormat, class VFormat>
void launch_decode_full_codes(const AttentionParams&, void* stream);
}  // namespace decode_full
namespace decode_stream {
template <class KFormat, class VFormat>
void launch_decode_stream_codes(const AttentionParams&, void* stream);
}  // namespace decode_stream

namespace {

// The pairs that are compiled, one .cu file each in full/ and, for one format, in stream/.
void launch(const AttentionParams& p, void* stream) {
  const KvFormat k = p.k_store.format, v = p.v_store.format;
  const bool full = p.window == 0;
  const auto one_format = [&](auto format) {
    using Format = decltype(format);
    if (full) return decode_full::launch_decode_full_codes<Format, Format>(p, stream);
    decode_stream::launch_decode_stream_codes<Format, Format>(p, stream);
  };
  if (k == v) return dispatch_kv_format(k, one_format);
  if (full && k == KvFormat::kInt8 && v == KvFormat::kInt4) {
    return decode_full::launch_decode_full_codes<Int8, Int4>(p, stream);
  }
  throw Error(concat("keys of format ", name(k), " with values of format ", name(v), full ? "" : " in a ring",
                     " are not supported on CUDA; supported: fp8, int8 and int4 for both, and in full caches keys "
                     "int8 with values int4 (every pair on the CPU)"));
}

const void* advance(const void* data, int64_t elements) { return static_cast<const char*>(data) + 2 * elements; }

// The launch for columns [begin, begin + count) of the call.
AttentionParams part(const AttentionParams& p, int begin, int count) {
  AttentionParams piece = p;
  piece.q = advance(p.q, begin * p.q_stride.token);
  piece.k_new = advance(p.k_new, begin * p.k_new_stride.token);
  piece.v_new = advance(p.v_new, begin * p.v_new_stride.token);
  piece.out = const_cast<void*>(advance(p.out, begin * p.out_stride.token));
  piece.q_len = count;
  piece.columns_before = begin;
  piece.columns_after = p.q_len - begin - count;
  return piece;
}

}  // namespace

void attention_codes_cuda(const AttentionParams& p, void* stream) {
  ZZ_CHECK(has_code_kernels(p.head_dim), "head_dim ", p.head_dim,
           " is not supported for quantised caches on CUDA; supported: 64, 128 (all on the CPU)");
  for (const int64_t stride : {p.k_store.scale_stride.token, p.v_store.scale_stride.token}) {
    ZZ_CHECK(stride >= 0 && stride < (int64_t{1} << 30), "token strides of the scales must be below 2^30, got ",
             stride);
  }
  ZZ_CHECK(p.slots > 0 || p.q_len <= kMaxDecodeQueries, "more than ", kMaxDecodeQueries,
           " new tokens over a quantised cache on CUDA need a cache with slots; got ", p.q_len, " tokens and 0 slots");
  if (p.q_len > kMaxDecodeQueries && prefill_codes_cuda(p, stream)) return;
  for (int begin = 0; begin < p.q_len; begin += kMaxDecodeQueries) {
    launch(part(p, begin, std::min(kMaxDecodeQueries, p.q_len - begin)), stream);
  }
}

}  // namespace zigzag
