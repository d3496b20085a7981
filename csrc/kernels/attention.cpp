// Parameter checks shared by the CPU and CUDA entries, and the choice of kernel.
#include "kernels/attention.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>
#include <string>
#include <vector>

#include "core/error.h"
#include "kernels/append/append.h"
#include "kernels/decode/codes/dispatch.h"
#include "kernels/decode/full/full.h"
#include "kernels/decode/stream/stream.h"
#include "kernels/merge/merge.h"
#include "kernels/prefill/prefill.h"

namespace zigzag {
namespace {

void check_head_dim(int head_dim) {
  if (std::find(std::begin(kHeadDims), std::end(kHeadDims), head_dim) != std::end(kHeadDims)) return;
  std::string list;
  for (int each : kHeadDims) list += (list.empty() ? "" : ", ") + std::to_string(each);
  throw Error(concat("head_dim ", head_dim, " is not supported; supported: ", list));
}

// Kernels may go on to the end of the tile that slot `slots` would be in, and count tokens from there, in an int.
constexpr int kMaxSlots = std::numeric_limits<int>::max() - 4096;

void check_layout(int slots, int sink, int window) {
  ZZ_CHECK(sink >= 0 && window >= 0, "sink and window must be >= 0 (window 0 marks a full cache), got sink ", sink,
           " and window ", window);
  const int64_t ring = static_cast<int64_t>(sink) + window;
  ZZ_CHECK(ring <= std::numeric_limits<int>::max(), "sink + window must be < 2^31, got ", ring);
  ZZ_CHECK(window == 0 || slots == 0 || slots >= ring, "a ring needs at least sink + window = ", ring,
           " slots, the cache has ", slots);
  ZZ_CHECK(slots <= kMaxSlots, "a cache may have up to ", kMaxSlots, " slots, this one has ", slots);
}

void check_rotary(const AttentionParams& p) {
  const Rotary& r = p.rotary;
  ZZ_CHECK((r.cos != nullptr) == (r.sin != nullptr) && (r.cos != nullptr) == (r.dim != 0),
           "cos and sin must be given both or neither");
  if (r.dim == 0) return;
  ZZ_CHECK(r.dim > 0 && r.dim % 8 == 0 && r.dim <= p.head_dim,
           "rotary_dim (last size of cos and sin) must be a multiple "
           "of 8, at most head_dim = ",
           p.head_dim, "; got ", r.dim);
  ZZ_CHECK(r.dtype == DType::kFloat32 || r.dtype == p.dtype, "cos and sin must be float32 or have the dtype of q, ",
           name(p.dtype), "; got ", name(r.dtype));
  ZZ_CHECK(p.q_len <= kMaxDecodeQueries, "cos and sin serve up to ", kMaxDecodeQueries, " new tokens a call, got ",
           p.q_len, "; apply RoPE before and leave them out");
}

void check_heads(const HeadMap& heads, int num_kv_heads) {
  if (heads.of == nullptr) return;
  ZZ_CHECK(num_kv_heads <= heads.total, "heads names ", num_kv_heads, " KV heads, k_new and v_new have ", heads.total);
}

// Only where the host can read them.
void check_head_numbers(const HeadMap& heads, int num_kv_heads) {
  if (heads.of == nullptr) return;
  std::vector<bool> seen(heads.total);
  for (int i = 0; i < num_kv_heads; ++i) {
    const int head = heads.of[i];
    ZZ_CHECK(head >= 0 && head < heads.total && !seen[head], "heads must hold distinct KV heads below ", heads.total,
             ", heads[", i, "] is ", head);
    seen[head] = true;
  }
}

// Only where the host can read them. On CUDA that would wait for the GPU: kernels take a negative length as 0, and skip
// a row whose number does not exist.
template <class Params>
void check_rows(const Params& p) {
  for (int b = 0; b < p.batch; ++b) {
    const int row = p.cache_rows.of == nullptr ? b : p.cache_rows.of[b];
    if (row == -1) continue;
    ZZ_CHECK(p.cache_rows.of == nullptr || (row >= 0 && row < p.cache_rows.total), "cache_rows must hold rows of the ",
             "caches, below ", p.cache_rows.total, ", or -1 for a row to skip; cache_rows[", b, "] is ", row);
    const int length = p.seq_lens[row];
    ZZ_CHECK(length >= 0 && length <= std::numeric_limits<int>::max() - p.q_len, "seq_lens[", row,
             "] must be in [0, 2^31 - q_len), got ", length);
  }
}

}  // namespace

void check_geometry(int num_q_heads, int num_kv_heads, int head_dim) {
  check_head_dim(head_dim);
  ZZ_CHECK(num_kv_heads > 0 && num_q_heads > 0 && num_q_heads % num_kv_heads == 0 &&
               num_q_heads / num_kv_heads <= kMaxGroupSize,
           "num_q_heads must be a multiple of num_kv_heads, at most ", kMaxGroupSize, " times as large; got ",
           num_q_heads, " query heads and ", num_kv_heads, " KV heads");
}

void check_params(const AttentionParams& p) {
  ZZ_CHECK(std::isfinite(p.softcap) && p.softcap >= 0, "softcap must be finite and >= 0 (0: no cap), got ", p.softcap);
  check_geometry(p.num_q_heads, p.num_kv_heads, p.head_dim);
  check_layout(p.slots, p.sink, p.window);
  check_rotary(p);
  check_heads(p.heads, p.num_kv_heads);
}

void check_params(const AppendParams& p) {
  check_head_dim(p.head_dim);
  check_layout(p.slots, p.sink, p.window);
  check_heads(p.heads, p.num_kv_heads);
}

void check_params(const MergeParams& p) { check_head_dim(p.head_dim); }

int64_t attention_workspace_bytes() { return decode_full_workspace_bytes(); }

void attention_cpu(const AttentionParams& p, const ParallelFor& parallel) {
  check_params(p);
  check_rows(p);
  check_head_numbers(p.heads, p.num_kv_heads);
  if (p.batch == 0 || p.q_len == 0) return;
  switch (select_attention_kernel(p.window, p.q_len)) {
    case AttentionKernel::kDecodeFull: return decode_full_cpu(p, parallel);
    case AttentionKernel::kDecodeStream: return decode_stream_cpu(p, parallel);
    case AttentionKernel::kPrefill: return prefill_cpu(p, parallel);
  }
}

void append_cpu(const AppendParams& p, const ParallelFor& parallel) {
  check_params(p);
  check_rows(p);
  check_head_numbers(p.heads, p.num_kv_heads);
  if (p.batch == 0 || p.q_len == 0) return;
  append_kernel_cpu(p, parallel);
}

void merge_states_cpu(const MergeParams& p, const ParallelFor& parallel) {
  check_params(p);
  if (p.rows == 0) return;
  merge_kernel_cpu(p, parallel);
}

#if ZIGZAG_WITH_CUDA
namespace {

void check_cuda(DType dtype) {
  ZZ_CHECK(dtype != DType::kFloat32,
           "dtype float32 is not supported on CUDA; supported: float16, bfloat16 (float32 on the CPU)");
}

}  // namespace

void attention_cuda(const AttentionParams& p, void* stream) {
  check_params(p);
  check_cuda(p.dtype);
  if (p.batch == 0 || p.q_len == 0) return;
  if (is_quantised(p)) return attention_codes_cuda(p, stream);
  switch (select_attention_kernel(p.window, p.q_len)) {
    case AttentionKernel::kDecodeFull: return decode_full_cuda(p, stream);
    case AttentionKernel::kDecodeStream: return decode_stream_cuda(p, stream);
    case AttentionKernel::kPrefill: return prefill_cuda(p, stream);
  }
}

void append_cuda(const AppendParams& p, void* stream) {
  check_params(p);
  check_cuda(p.dtype);
  if (p.batch == 0 || p.q_len == 0) return;
  append_kernel_cuda(p, stream);
}

void merge_states_cuda(const MergeParams& p, void* stream) {
  check_params(p);
  check_cuda(p.dtype);
  if (p.rows == 0) return;
  merge_kernel_cuda(p, stream);
}
#else
namespace {

[[noreturn]] void no_cuda() {
  throw Error("this build of zigzag_ext has no CUDA kernels; rebuild with nvcc on the PATH or ZIGZAG_CUDA=on");
}

}  // namespace

void attention_cuda(const AttentionParams&, void*) { no_cuda(); }
void append_cuda(const AppendParams&, void*) { no_cuda(); }
void merge_states_cuda(const MergeParams&, void*) { no_cuda(); }
#endif

}  // namespace zigzag
