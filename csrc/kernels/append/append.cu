// Append on CUDA. Plain caches: a copy of rows to their slots; both supported dtypes are 2 bytes wide, so one kernel
// moves both. Quantised caches: a warp encodes one vector.
#include "cuda/launch.h"
#include "kernels/append/append.h"
#include "kv/codec_cuda.cuh"
#include "kv/ring.h"

namespace zigzag {
namespace {

constexpr int kThreads = 256;

ZZ_HOST_DEVICE RingLayout ring_layout(const AppendParams& p) { return {p.sink, p.window, p.slots}; }

// Tokens per row that may have to be written: of a long chunk a ring keeps the first `sink` and the last `span`.
ZZ_HOST_DEVICE int candidate_tokens(const AppendParams& p) {
  const bool compact = p.window > 0 && p.q_len > p.slots;
  return compact ? p.slots : p.q_len;
}

// Chunk column of candidate `i` of a row, or -1 if that token is padding, does not survive the chunk, or is listed
// twice.
__device__ __forceinline__ int candidate_column(const AppendParams& p, int i, const ChunkRow& row) {
  const auto [cache_row, length, pad] = row;
  const RingLayout layout = ring_layout(p);
  const bool compact = candidate_tokens(p) < p.q_len;
  const int column = !compact ? i : i < p.sink ? pad + i : p.q_len - layout.span() + (i - p.sink);
  const int position = length + column - pad;
  if (column < pad || column >= p.q_len) return -1;
  if (compact && (i < p.sink) != (position < p.sink)) return -1;
  return layout.survives(position, length + p.q_len - pad) ? column : -1;
}

__device__ __forceinline__ int64_t offset(const Strides& stride, int row, int head, int token) {
  return row * stride.batch + head * stride.head + token * stride.token;
}

__device__ __forceinline__ void copy_16(void* to, int64_t to_element, const void* from, int64_t from_element) {
  *reinterpret_cast<uint4*>(static_cast<uint16_t*>(to) + to_element) =
      *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(from) + from_element);
}

// Grid (tokens, num_kv_heads, batch); block (head_dim / 8, tokens): a thread moves 16 bytes of K and of V of one token.
__global__ void __launch_bounds__(kThreads) append_kernel(const __grid_constant__ AppendParams p) {
  const int head = blockIdx.y, batch = blockIdx.z, element = threadIdx.x * 8;
  const int candidate = blockIdx.x * blockDim.y + threadIdx.y;
  if (candidate >= candidate_tokens(p)) return;
  const ChunkRow row = chunk_row(p, batch);
  const int column = candidate_column(p, candidate, row);
  if (column < 0) return;
  const int slot = ring_layout(p).slot(row.length + column - row.pad);
  if (slot >= p.slots) return;

  const int new_head = p.heads(head);
  const auto copy = [&](void* to, const Strides& to_stride, const void* from, const Strides& from_stride) {
    copy_16(to, offset(to_stride, row.cache_row, head, slot) + element, from,
            offset(from_stride, batch, new_head, column) + element);
  };
  copy(p.k_cache, p.k_cache_stride, p.k_new, p.k_new_stride);
  copy(p.v_cache, p.v_cache_stride, p.v_new, p.v_new_stride);
}

// A vector of at most 256 elements, eight a lane: lane i holds elements 8 i on.
template <class Format, class Element>
__device__ __forceinline__ void store_codes(uint4 piece, bool held, char* row, float* scale) {
  const auto encoded = EncodedPiece<Format>::template encode<Element>(piece);
  Quad<Format>* quads = reinterpret_cast<Quad<Format>*>(row) + threadIdx.x % 32 * 2;
  if (held) quads[0] = encoded.low, quads[1] = encoded.high;
  if (threadIdx.x % 32 == 0) *scale = encoded.scale;
}

// Grid (tokens, num_kv_heads, batch): a warp per token stores K, then V, either of which may be plain.
template <class Element>
__global__ void __launch_bounds__(kThreads) append_codes_kernel(const __grid_constant__ AppendParams p) {
  const int head = blockIdx.y, batch = blockIdx.z, lane = threadIdx.x % 32;
  const int candidate = blockIdx.x * (kThreads / 32) + threadIdx.x / 32;
  if (candidate >= candidate_tokens(p)) return;
  const ChunkRow row = chunk_row(p, batch);
  const int column = candidate_column(p, candidate, row);
  if (column < 0) return;
  const int slot = ring_layout(p).slot(row.length + column - row.pad);
  if (slot >= p.slots) return;

  const bool held = lane < p.head_dim / 8;
  const auto store = [&](const void* from, const Strides& from_stride, const KvStore& to, void* cache,
                         const Strides& to_stride) {
    uint4 piece = make_uint4(0, 0, 0, 0);
    const uint16_t* source = static_cast<const uint16_t*>(from) + offset(from_stride, batch, p.heads(head), column);
    if (held) piece = reinterpret_cast<const uint4*>(source)[lane];
    const int64_t at = offset(to_stride, row.cache_row, head, slot);
    if (to.format == KvFormat::kPlain) {
      if (held) reinterpret_cast<uint4*>(static_cast<uint16_t*>(cache) + at)[lane] = piece;
      return;
    }
    char* codes = static_cast<char*>(cache) + at;
    float* scale = to.scale + offset(to.scale_stride, row.cache_row, head, slot);
    switch (to.format) {
      case KvFormat::kFp8: return store_codes<Fp8, Element>(piece, held, codes, scale);
      case KvFormat::kInt8: return store_codes<Int8, Element>(piece, held, codes, scale);
      case KvFormat::kInt4: return store_codes<Int4, Element>(piece, held, codes, scale);
      default: return;
    }
  };
  store(p.k_new, p.k_new_stride, p.k_store, p.k_cache, p.k_cache_stride);
  store(p.v_new, p.v_new_stride, p.v_store, p.v_cache, p.v_cache_stride);
}

void append_codes(const AppendParams& p, void* stream) {
  ZZ_CHECK(p.head_dim <= 256, "head_dim ", p.head_dim,
           " is not supported for quantised caches on CUDA; supported: up to 256");
  constexpr int kTokens = kThreads / 32;
  cuda::LaunchConfig config;
  config.block = dim3(kThreads);
  config.grid = dim3(static_cast<unsigned>((candidate_tokens(p) + kTokens - 1) / kTokens),
                     static_cast<unsigned>(p.num_kv_heads), static_cast<unsigned>(p.batch));
  const bool bf16 = p.dtype == DType::kBFloat16;
  cuda::launch(bf16 ? append_codes_kernel<__nv_bfloat16> : append_codes_kernel<__half>, config, p, stream);
}

}  // namespace

void append_kernel_cuda(const AppendParams& p, void* stream) {
  if (p.slots == 0) return;
  if (is_quantised(p)) return append_codes(p, stream);
  const unsigned chunks = static_cast<unsigned>(p.head_dim) / 8;
  const unsigned tokens = kThreads / chunks;
  cuda::LaunchConfig config;
  config.block = dim3(chunks, tokens);
  config.grid = dim3((candidate_tokens(p) + tokens - 1) / tokens, static_cast<unsigned>(p.num_kv_heads),
                     static_cast<unsigned>(p.batch));
  cuda::launch(append_kernel, config, p, stream);
}

}  // namespace zigzag
