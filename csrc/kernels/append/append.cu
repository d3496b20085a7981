// Append on CUDA: a copy of rows to their slots. Both supported dtypes are 2 bytes wide, so one kernel moves both.
#include "device/launch.h"
#include "kernels/append/append.h"
#include "kv/ring.h"

namespace zigzag {
namespace {

constexpr int kThreads = 256;

// Tokens per row that may have to be written: of a long chunk a ring keeps the first `sink` and the last `window`.
ZZ_HOST_DEVICE int candidate_tokens(const AppendParams& p) {
  const bool compact = p.window > 0 && p.q_len - p.sink > p.window;
  return compact ? p.sink + p.window : p.q_len;
}

// Chunk column of candidate `i`, or -1 if that token is padding, does not survive the chunk, or is listed twice.
__device__ __forceinline__ int candidate_column(const AppendParams& p, int i, int length, int pad) {
  const RingLayout layout{p.sink, p.window};
  const bool compact = candidate_tokens(p) < p.q_len;
  const int column = !compact ? i : i < p.sink ? pad + i : p.q_len - p.window + (i - p.sink);
  const int position = length + column - pad;
  if (column < pad || column >= p.q_len) return -1;
  if (compact && (i < p.sink) != (position < p.sink)) return -1;
  return layout.survives(position, length + p.q_len - pad) ? column : -1;
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
  const int length = max(0, p.seq_lens[batch]);
  const int pad = p.pad == nullptr ? 0 : p.pad[batch];
  const int column = candidate_column(p, candidate, length, pad);
  if (column < 0) return;
  const int slot = RingLayout{p.sink, p.window}.slot(length + column - pad);
  if (slot >= p.slots) return;

  const auto offset = [&](const Strides& stride, int head, int token) {
    return batch * stride.batch + head * stride.head + token * stride.token + element;
  };
  const int new_head = p.heads(head);
  copy_16(p.k_cache, offset(p.k_cache_stride, head, slot), p.k_new, offset(p.k_new_stride, new_head, column));
  copy_16(p.v_cache, offset(p.v_cache_stride, head, slot), p.v_new, offset(p.v_new_stride, new_head, column));
}

}  // namespace

void append_kernel_cuda(const AppendParams& p, void* stream) {
  if (p.slots == 0) return;
  const unsigned chunks = static_cast<unsigned>(p.head_dim) / 8;
  const unsigned tokens = kThreads / chunks;
  device::LaunchConfig config;
  config.block = dim3(chunks, tokens);
  config.grid = dim3((candidate_tokens(p) + tokens - 1) / tokens, static_cast<unsigned>(p.num_kv_heads),
                     static_cast<unsigned>(p.batch));
  device::launch(append_kernel, config, p, stream);
}

}  // namespace zigzag
