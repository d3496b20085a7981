// Prefill on CUDA: attention, then the append, which may overwrite ring slots that the attention still had to read.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/launch.h"
#include "kernels/append/append.h"
#include "kernels/prefill/prefill.h"

namespace zigzag {
namespace prefill {

template <class T>
void launch_prefill_mma(const AttentionParams& p, void* stream);
template <class T>
bool launch_prefill_wgmma(const AttentionParams& p, void* stream);  // compiled where ZIGZAG_SM90A is 1

template <class T>
void launch_prefill(const AttentionParams& p, void* stream) {
#if ZIGZAG_SM90A
  // What is compiled for sm_90a runs on no other architecture, later ones included.
  if (cuda::device_facts().arch == 90 && !cuda::launch_options().force_plain && launch_prefill_wgmma<T>(p, stream))
    return;
#endif
  launch_prefill_mma<T>(p, stream);
}

}  // namespace prefill

void prefill_cuda(const AttentionParams& p, void* stream) {
  if (p.dtype == DType::kFloat16) {
    prefill::launch_prefill<__half>(p, stream);
  } else {
    prefill::launch_prefill<__nv_bfloat16>(p, stream);
  }
  AppendParams append = {};
  append.k_new = p.k_new;
  append.v_new = p.v_new;
  append.k_cache = p.k_cache;
  append.v_cache = p.v_cache;
  append.seq_lens = p.seq_lens;
  append.pad = p.pad;
  append.k_new_stride = p.k_new_stride;
  append.v_new_stride = p.v_new_stride;
  append.k_cache_stride = p.k_cache_stride;
  append.v_cache_stride = p.v_cache_stride;
  append.batch = p.batch;
  append.num_kv_heads = p.num_kv_heads;
  append.q_len = p.q_len;
  append.head_dim = p.head_dim;
  append.slots = p.slots;
  append.sink = p.sink;
  append.window = p.window;
  append.dtype = p.dtype;
  append.heads = p.heads;
  append.cache_rows = p.cache_rows;
  append_kernel_cuda(append, stream);
}

}  // namespace zigzag
