// Prefill on CUDA: attention, then the append, which may overwrite ring slots that the attention still had to read.
// Over codes in a full cache, where nothing is overwritten, the append comes first.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <climits>

#include "cuda/launch.h"
#include "kernels/append/append.h"
#include "kernels/decode/full/workspace.h"
#include "kernels/prefill/pipeline_plan.h"
#include "kernels/prefill/prefill.h"
#include "kv/formats.h"

namespace zigzag {
namespace prefill {

template <class T>
void launch_prefill_mma(const AttentionParams& p, void* stream);
// Compiled where ZIGZAG_SM90A is 1. What is compiled for sm_90a runs on no other architecture, later ones included.
template <class T>
bool launch_prefill_wgmma(const AttentionParams& p, void* stream);
template <class T>
void launch_prefill_pipeline(const AttentionParams& p, const PrefillPlan& plan, void* stream);
template <class KFormat, class VFormat>
void launch_prefill_codes(const AttentionParams& p, const PrefillPlan& plan, void* stream);

namespace {

#if ZIGZAG_SM90A
PrefillPlan plan_of(const AttentionParams& p) {
  const PrefillRequest request = PrefillRequest::of(p);
  const int64_t scratch = p.workspace_bytes - decode_full::kCounterBytes;
  const PrefillPlan plan = plan_prefill(request, cuda::device_facts(), cuda::launch_options(), scratch);
  const int64_t rows = int64_t{request.q_len} * request.group;
  ZZ_CHECK(rows <= INT_MAX - kPipelineRows && plan.tiles <= INT_MAX, "q_len ", p.q_len, " with batch ", p.batch,
           " and ", p.num_q_heads, " query heads is more than one launch can hold; split the chunk");
  return plan;
}
#endif

template <class T>
void launch_prefill(const AttentionParams& p, void* stream) {
#if ZIGZAG_SM90A
  const PrefillPlan plan = plan_of(p);
  if (plan.kernel == PrefillKernel::kPipeline) return launch_prefill_pipeline<T>(p, plan, stream);
  if (cuda::device_facts().arch == 90 && !cuda::launch_options().force_plain && launch_prefill_wgmma<T>(p, stream))
    return;
#endif
  launch_prefill_mma<T>(p, stream);
}

void append(const AttentionParams& p, void* stream) {
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
  append.k_store = p.k_store;
  append.v_store = p.v_store;
  append_kernel_cuda(append, stream);
}

}  // namespace
}  // namespace prefill

void prefill_cuda(const AttentionParams& p, void* stream) {
  if (p.dtype == DType::kFloat16) {
    prefill::launch_prefill<__half>(p, stream);
  } else {
    prefill::launch_prefill<__nv_bfloat16>(p, stream);
  }
  prefill::append(p, stream);
}

#if ZIGZAG_SM90A
bool prefill_codes_cuda(const AttentionParams& p, void* stream) {
  const prefill::PrefillPlan plan = prefill::plan_of(p);
  if (plan.kernel != prefill::PrefillKernel::kPipeline || p.softcap > 0.0f) return false;
  prefill::append(p, stream);
  if (p.k_store.format == p.v_store.format) {
    dispatch_kv_format(p.k_store.format, [&](auto format) {
      using Format = decltype(format);
      prefill::launch_prefill_codes<Format, Format>(p, plan, stream);
    });
  } else {
    prefill::launch_prefill_codes<Int8, Int4>(p, plan, stream);  // the one pair that has_pipeline() lets through
  }
  return true;
}
#else
bool prefill_codes_cuda(const AttentionParams&, void*) { return false; }
#endif

}  // namespace zigzag
