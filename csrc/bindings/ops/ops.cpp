// The torch ops: check arguments, fill params, call the core. Fake kernels are registered in zigzag_ext/ops.py.
// Errors surface in Python as RuntimeError, before anything is written.
#include <Python.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>

#include "bindings/ops/cache_checks.h"
#include "bindings/ops/device.h"
#include "bindings/ops/overlap.h"
#include "bindings/ops/tensor_checks.h"
#include "kernels/attention.h"

namespace zigzag::bindings {
namespace {

template <class Params>
void run(const Tensor& tensor, const Params& params, void (*cuda)(const Params&, void*),
         void (*cpu)(const Params&, const ParallelFor&)) {
  if (tensor.is_cuda()) {
    const torch::stable::accelerator::DeviceGuard guard(tensor.get_device_index());
    cuda(params, current_cuda_stream(tensor));
  } else {
    cpu(params, torch_parallel_for());
  }
}

void check_dims(const Tensor& k_new, const Tensor& k_cache) {
  ZZ_CHECK(k_new.dim() == 4, "k_new must be [batch, num_kv_heads, q_len, head_dim], got ", shape_string(k_new));
  ZZ_CHECK(k_cache.dim() == 4, "k_cache must be [rows, num_kv_heads, slots, head_dim], got ", shape_string(k_cache));
}

// What appending and attending have in common: the caches with their scales, lengths, padding, cache rows and the
// layout. `like` is the tensor of new tokens that the others must match.
template <class Params>
void check_stored(Params& p, const Tensor& like, const char* like_name, const CacheShape& shape, const Tensor& k_cache,
                  const Tensor& v_cache, const Tensor& seq_lens, const std::optional<Tensor>& pad,
                  const std::optional<Tensor>& cache_rows, int64_t sink, int64_t window,
                  const std::optional<Tensor>& k_scale, const std::optional<Tensor>& v_scale) {
  const int64_t batch = like.size(0);
  check_cache("k_cache", k_cache, "k_scale", k_scale, shape, like, p.k_store, p.k_cache_stride);
  check_cache("v_cache", v_cache, "v_scale", v_scale, shape, like, p.v_store, p.v_cache_stride);
  p.seq_lens = check_numbers("seq_lens", seq_lens, shape.rows, like_name, like);
  p.pad = check_numbers("pad", pad, batch, like_name, like);
  p.cache_rows = {check_numbers("cache_rows", cache_rows, batch, like_name, like), to_int("cache rows", shape.rows)};
  p.batch = to_int("batch", batch);
  p.num_kv_heads = to_int("num_kv_heads", shape.heads);
  p.q_len = to_int("q_len", like.size(2));
  p.head_dim = to_int("head_dim", like.size(3));
  p.slots = to_int("slots", shape.slots);
  p.sink = to_int("sink", sink);
  p.window = to_int("window", window);
  p.dtype = to_dtype(like.scalar_type());
}

void add_stored(MemoryCheck& memory, const Tensor& k_new, const Tensor& v_new, const Tensor& k_cache,
                const Tensor& v_cache, const Tensor& seq_lens, const std::optional<Tensor>& pad,
                const std::optional<Tensor>& cache_rows, const std::optional<Tensor>& k_scale,
                const std::optional<Tensor>& v_scale) {
  memory.reads("k_new", k_new);
  memory.reads("v_new", v_new);
  memory.writes("k_cache", k_cache);
  memory.writes("v_cache", v_cache);
  memory.reads("seq_lens", seq_lens);
  memory.reads("pad", pad);
  memory.reads("cache_rows", cache_rows);
  memory.writes("k_scale", k_scale);
  memory.writes("v_scale", v_scale);
}

template <class Params>
void take_stored(Params& p, const Tensor& k_new, const Tensor& v_new, const Tensor& k_cache, const Tensor& v_cache,
                 const std::optional<Tensor>& k_scale, const std::optional<Tensor>& v_scale) {
  p.k_new = k_new.const_data_ptr();
  p.v_new = v_new.const_data_ptr();
  p.k_cache = k_cache.mutable_data_ptr();
  p.v_cache = v_cache.mutable_data_ptr();
  p.k_store.scale = scale_pointer(k_scale);
  p.v_store.scale = scale_pointer(v_scale);
}

void append_(const Tensor& k_new, const Tensor& v_new, const Tensor& k_cache, const Tensor& v_cache,
             const Tensor& seq_lens, const std::optional<Tensor>& pad, const std::optional<Tensor>& cache_rows,
             int64_t sink, int64_t window, const std::optional<Tensor>& k_scale, const std::optional<Tensor>& v_scale) {
  check_dims(k_new, k_cache);
  const int64_t batch = k_new.size(0), heads = k_new.size(1), q_len = k_new.size(2), head_dim = k_new.size(3);
  AppendParams p = {};
  p.k_new_stride = check_heads("k_new", k_new, {batch, heads, q_len, head_dim}, k_new);
  p.v_new_stride = check_heads("v_new", v_new, {batch, heads, q_len, head_dim}, k_new);
  const CacheShape shape = {cache_rows ? k_cache.size(0) : batch, heads, k_cache.size(2)};
  check_stored(p, k_new, "k_new", shape, k_cache, v_cache, seq_lens, pad, cache_rows, sink, window, k_scale, v_scale);
  MemoryCheck memory;
  add_stored(memory, k_new, v_new, k_cache, v_cache, seq_lens, pad, cache_rows, k_scale, v_scale);
  memory.check();
  take_stored(p, k_new, v_new, k_cache, v_cache, k_scale, v_scale);
  run(k_new, p, append_cuda, append_cpu);
}

void attention_(const Tensor& q, const Tensor& k_new, const Tensor& v_new, const Tensor& k_cache, const Tensor& v_cache,
                const Tensor& seq_lens, const std::optional<Tensor>& pad, const std::optional<Tensor>& cos,
                const std::optional<Tensor>& sin, const std::optional<Tensor>& heads,
                const std::optional<Tensor>& cache_rows, const Tensor& out, const Tensor& lse, const Tensor& workspace,
                int64_t sink, int64_t window, double scale, const std::optional<Tensor>& k_scale,
                const std::optional<Tensor>& v_scale, double softcap, const std::optional<Tensor>& sink_logits) {
  ZZ_CHECK(q.dim() == 4, "q must be [batch, num_q_heads, q_len, head_dim], got ", shape_string(q));
  check_dims(k_new, k_cache);
  const int64_t batch = q.size(0), q_heads = q.size(1), q_len = q.size(2), head_dim = q.size(3);
  const int64_t kv_heads = k_new.size(1);
  const CacheShape shape = {cache_rows ? k_cache.size(0) : batch, heads ? k_cache.size(1) : kv_heads, k_cache.size(2)};
  AttentionParams p = {};
  if (heads) p.heads = check_heads_served(*heads, shape.heads, kv_heads, q);
  p.q_stride = check_heads("q", q, {batch, q_heads, q_len, head_dim}, q);
  p.k_new_stride = check_heads("k_new", k_new, {batch, kv_heads, q_len, head_dim}, q);
  p.v_new_stride = check_heads("v_new", v_new, {batch, kv_heads, q_len, head_dim}, q);
  check_stored(p, q, "q", shape, k_cache, v_cache, seq_lens, pad, cache_rows, sink, window, k_scale, v_scale);
  check_geometry(to_int("num_q_heads", q_heads), to_int("num_kv_heads", kv_heads), p.head_dim);
  p.num_q_heads = to_int("num_q_heads", q_heads / kv_heads * shape.heads);
  p.scale = static_cast<float>(scale);
  p.softcap = static_cast<float>(softcap);
  p.sink_logits = check_sink_logits(sink_logits, q_heads, q);
  p.rotary = check_rotary(cos, sin, q);
  check_params(p);
  if (q.is_cuda()) {
    const int64_t needed = attention_workspace_bytes();
    ZZ_CHECK(workspace.is_cuda() && workspace.get_device_index() == q.get_device_index() &&
                 workspace.scalar_type() == ScalarType::Byte && workspace.is_contiguous() &&
                 workspace.numel() >= needed,
             "workspace must be a contiguous uint8 tensor of at least ", needed,
             " zeroed bytes on the device of q; make it with ", "zigzag_ext.ops.new_workspace");
    p.workspace = workspace.mutable_data_ptr();
    p.workspace_bytes = workspace.numel();
  }
  p.out_stride = check_heads("out", out, {batch, q_heads, q_len, head_dim}, q);
  check_lse(lse, {batch, q_heads, q_len}, q);
  MemoryCheck memory;
  memory.reads("q", q);
  add_stored(memory, k_new, v_new, k_cache, v_cache, seq_lens, pad, cache_rows, k_scale, v_scale);
  memory.reads("cos", cos);
  memory.reads("sin", sin);
  memory.reads("heads", heads);
  memory.reads("sink_logits", sink_logits);
  memory.writes("out", out);
  memory.writes("lse", lse);
  memory.writes("workspace", workspace);
  memory.check();
  take_stored(p, k_new, v_new, k_cache, v_cache, k_scale, v_scale);
  p.q = q.const_data_ptr();
  p.out = out.mutable_data_ptr();
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  run(q, p, attention_cuda, attention_cpu);
}

std::tuple<Tensor, Tensor> merge_states(const Tensor& out_a, const Tensor& lse_a, const Tensor& out_b,
                                        const Tensor& lse_b) {
  ZZ_CHECK(out_a.dim() == 4, "out_a must be [batch, num_q_heads, q_len, head_dim], got ", shape_string(out_a));
  const int64_t batch = out_a.size(0), heads = out_a.size(1), q_len = out_a.size(2), head_dim = out_a.size(3);
  check_shape("out_b", out_b, {batch, heads, q_len, head_dim});
  check_shape("lse_a", lse_a, {batch, heads, q_len});
  check_shape("lse_b", lse_b, {batch, heads, q_len});
  check_same("out_b", out_b, "out_a", out_a);
  check_same("lse_b", lse_b, "lse_a", lse_a);
  ZZ_CHECK(lse_a.scalar_type() == ScalarType::Float, "lse_a and lse_b must be float32");
  ZZ_CHECK(lse_a.is_cuda() == out_a.is_cuda() && lse_a.get_device_index() == out_a.get_device_index(),
           "lse_a must be on the device of out_a");
  const Tensor a = torch::stable::contiguous(out_a), b = torch::stable::contiguous(out_b);
  const Tensor la = torch::stable::contiguous(lse_a), lb = torch::stable::contiguous(lse_b);
  Tensor out = torch::stable::new_empty(a, {batch, heads, q_len, head_dim});
  Tensor lse = torch::stable::new_empty(la, {batch, heads, q_len});
  MergeParams p = {};
  p.out_a = a.const_data_ptr();
  p.lse_a = static_cast<const float*>(la.const_data_ptr());
  p.out_b = b.const_data_ptr();
  p.lse_b = static_cast<const float*>(lb.const_data_ptr());
  p.out = out.mutable_data_ptr();
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  p.rows = batch * heads * q_len;
  p.head_dim = to_int("head_dim", head_dim);
  p.dtype = to_dtype(out_a.scalar_type());
  run(a, p, merge_states_cuda, merge_states_cpu);
  return {out, lse};
}

template <class Library>
void implement(Library& m) {
  m.impl("append_", TORCH_BOX(&append_));
  m.impl("attention_", TORCH_BOX(&attention_));
  m.impl("merge_states", TORCH_BOX(&merge_states));
}

}  // namespace

STABLE_TORCH_LIBRARY(zigzag, m) {
  m.def(
      "append_(Tensor k_new, Tensor v_new, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor seq_lens, Tensor? pad, "
      "Tensor? cache_rows, int sink, int window, Tensor(c!)? k_scale=None, Tensor(d!)? v_scale=None) -> ()");
  m.def(
      "attention_(Tensor q, Tensor k_new, Tensor v_new, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor seq_lens, "
      "Tensor? pad, Tensor? cos, Tensor? sin, Tensor? heads, Tensor? cache_rows, Tensor(c!) out, Tensor(d!) lse, "
      "Tensor(e!) workspace, int sink, int window, float scale, Tensor(f!)? k_scale=None, Tensor(g!)? v_scale=None, "
      "float softcap=0., Tensor? sink_logits=None) -> ()");
  m.def("merge_states(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(zigzag, CPU, m) { implement(m); }
STABLE_TORCH_LIBRARY_IMPL(zigzag, CUDA, m) { implement(m); }

}  // namespace zigzag::bindings

// Importing the module runs the registrations above; it has no contents of its own.
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__ops() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_ops", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
