#include "engine/scheduler.h"

#include <algorithm>
#include <limits>
#include <utility>

namespace zigzag {
namespace {

std::vector<int32_t> heads_of(const HeadKinds& layer, LayerKind kind) {
  std::vector<int32_t> heads;
  for (std::size_t head = 0; head < layer.kinds.size(); ++head) {
    if (layer.kinds[head] == kind) heads.push_back(static_cast<int32_t>(head));
  }
  return heads;
}

void check_tensors(const CacheSpec& spec, const CacheTensors& tensors, int layer) {
  const std::pair<KvFormat, const float*> sides[] = {{spec.formats.k, tensors.k_scale},
                                                     {spec.formats.v, tensors.v_scale}};
  for (const auto& [format, scale] : sides) {
    ZZ_CHECK((format == KvFormat::kPlain) == (scale == nullptr), "layer ", layer, ": the ", name(spec.kind),
             " cache holds ", format == KvFormat::kPlain ? "elements" : name(format),
             scale == nullptr ? " codes and needs scales" : " of the model's dtype and takes no scales");
  }
  ZZ_CHECK(is_ring(spec.kind) || (tensors.capacity >= 0 && tensors.capacity <= std::numeric_limits<int32_t>::max()),
           "layer ", layer, ": capacity must lie in [0, 2^31), got ", tensors.capacity);
}

}  // namespace

Scheduler::Scheduler(const LayerPlan& plan, const ModelGeometry& geometry, int64_t rollback) : geometry_(geometry) {
  check_geometry(geometry.num_q_heads, geometry.num_kv_heads, geometry.head_dim);
  ZZ_CHECK(plan.num_kv_heads() == 0 || plan.num_kv_heads() == geometry.num_kv_heads, "the plan is for layers of ",
           plan.num_kv_heads(), " KV heads, these have ", geometry.num_kv_heads);
  constexpr int64_t kMaxSlots = std::numeric_limits<int32_t>::max();
  layers_.reserve(plan.layers().size());
  for (const HeadKinds& layer : plan.layers()) {
    const RingSize size = plan.size(num_layers());
    ZZ_CHECK(rollback >= 0 && rollback <= kMaxSlots - size.sink - size.window,
             "rollback must be >= 0 tokens, and sink + window + rollback < 2^31; got ", rollback);
    std::vector<CacheSpec>& caches = layers_.emplace_back();
    for (const LayerKind kind : kLayerKinds) {
      std::vector<int32_t> heads = heads_of(layer, kind);
      if (heads.empty() || kind == LayerKind::kState) continue;
      if (!layer.mixed()) heads.clear();
      const int count = layer.mixed() ? static_cast<int>(heads.size()) : geometry.num_kv_heads;
      caches.push_back(is_ring(kind)
                           ? CacheSpec{kind, static_cast<int>(size.sink), static_cast<int>(size.window),
                                       static_cast<int>(rollback), geometry.streaming, count, std::move(heads)}
                           : CacheSpec{kind, 0, 0, 0, geometry.retrieval, count, std::move(heads)});
    }
  }
}

const std::vector<CacheSpec>& Scheduler::caches(int layer) const {
  ZZ_CHECK(layer >= 0 && layer < num_layers(), "layer ", layer, " does not exist; the plan has layers 0 to ",
           num_layers() - 1);
  return layers_[static_cast<std::size_t>(layer)];
}

int Scheduler::launches_per_step() const {
  std::size_t launches = 0;
  for (const std::vector<CacheSpec>& caches : layers_) launches += caches.size();
  return static_cast<int>(launches);
}

int64_t Scheduler::cache_bytes(const CacheSpec& cache, int64_t batch, int64_t max_len) const {
  return zigzag::kv_bytes({cache.num_kv_heads, cache.slots(max_len), geometry_.head_dim, geometry_.head_dim,
                           static_cast<int64_t>(element_size(geometry_.dtype)), cache.formats},
                          batch);
}

KvBytes Scheduler::kv_bytes(int64_t batch, int64_t max_len) const {
  KvBytes bytes{0, 0, 0};
  for (const std::vector<CacheSpec>& caches : layers_) {
    for (const CacheSpec& cache : caches) {
      int64_t& sum = cache.kind == LayerKind::kRetrieval   ? bytes.retrieval
                     : cache.kind == LayerKind::kStreaming ? bytes.streaming
                                                           : bytes.native;
      sum = detail::checked_sum(sum, cache_bytes(cache, batch, max_len));
    }
  }
  detail::checked_sum(detail::checked_sum(bytes.retrieval, bytes.streaming), bytes.native);
  return bytes;
}

int64_t Scheduler::all_retrieval_kv_bytes(int64_t batch, int64_t max_len) const {
  const CacheSpec whole{LayerKind::kRetrieval, 0, 0, 0, geometry_.retrieval, geometry_.num_kv_heads, {}};
  const auto keeps = [](const std::vector<CacheSpec>& caches) { return !caches.empty(); };
  return detail::checked_product(
      {std::count_if(layers_.begin(), layers_.end(), keeps), cache_bytes(whole, batch, max_len)});
}

AttentionParams Scheduler::params(int layer, int cache, const Step& step, const LayerTensors& tensors) const {
  const std::vector<CacheSpec>& specs = caches(layer);
  ZZ_CHECK(cache >= 0 && cache < static_cast<int>(specs.size()), "layer ", layer, " has ", specs.size(),
           " caches, not one of number ", cache);
  const CacheSpec& spec = specs[static_cast<std::size_t>(cache)];
  const CacheTensors& store = tensors.caches[cache];
  check_tensors(spec, store, layer);
  AttentionParams p = {};
  p.q = tensors.q, p.k_new = tensors.k_new, p.v_new = tensors.v_new;
  p.k_cache = store.k, p.v_cache = store.v;
  p.out = tensors.out, p.lse = tensors.lse;
  p.seq_lens = step.seq_lens, p.pad = step.pad, p.cache_rows = step.cache_rows;
  p.workspace = step.workspace, p.workspace_bytes = step.workspace_bytes;
  p.q_stride = tensors.q_stride, p.k_new_stride = tensors.k_new_stride, p.v_new_stride = tensors.v_new_stride;
  p.k_cache_stride = store.k_stride, p.v_cache_stride = store.v_stride, p.out_stride = tensors.out_stride;
  p.batch = step.batch, p.q_len = step.q_len;
  p.num_q_heads = geometry_.num_q_heads / geometry_.num_kv_heads * spec.num_kv_heads;
  p.num_kv_heads = spec.num_kv_heads;
  p.head_dim = geometry_.head_dim;
  p.slots = static_cast<int>(spec.slots(store.capacity));
  p.sink = spec.sink, p.window = spec.window;
  p.scale = tensors.scale;
  p.softcap = tensors.softcap, p.sink_logits = tensors.sink_logits;
  p.dtype = geometry_.dtype;
  p.rotary = tensors.rotary;
  p.k_store = {spec.formats.k, store.k_scale, store.k_scale_stride};
  p.v_store = {spec.formats.v, store.v_scale, store.v_scale_stride};
  if (!spec.heads.empty()) p.heads = {store.heads, geometry_.num_kv_heads};
  return p;
}

void Scheduler::run_layer_cpu(int layer, const Step& step, const LayerTensors& tensors,
                              const ParallelFor& parallel) const {
  for (int cache = 0; cache < static_cast<int>(caches(layer).size()); ++cache) {
    AttentionParams p = params(layer, cache, step, tensors);
    const std::vector<int32_t>& heads = caches(layer)[static_cast<std::size_t>(cache)].heads;
    if (!heads.empty() && p.heads.of == nullptr) p.heads.of = heads.data();
    attention_cpu(p, parallel);
  }
}

void Scheduler::run_layer_cuda(int layer, const Step& step, const LayerTensors& tensors, void* stream) const {
  for (int cache = 0; cache < static_cast<int>(caches(layer).size()); ++cache) {
    const AttentionParams p = params(layer, cache, step, tensors);
    ZZ_CHECK(caches(layer)[static_cast<std::size_t>(cache)].heads.empty() || p.heads.of != nullptr, "layer ", layer,
             " is mixed: on CUDA each of its caches needs `heads`, CacheSpec::heads copied to the device");
    attention_cuda(p, stream);
  }
}

void Scheduler::step_cpu(const Step& step, const LayerCall& tensors, const ParallelFor& parallel) const {
  for (int layer = 0; layer < num_layers(); ++layer) {
    if (!caches(layer).empty()) run_layer_cpu(layer, step, tensors(layer), parallel);
  }
}

void Scheduler::step_cuda(const Step& step, const LayerCall& tensors, void* stream) const {
  for (int layer = 0; layer < num_layers(); ++layer) {
    if (!caches(layer).empty()) run_layer_cuda(layer, step, tensors(layer), stream);
  }
}

}  // namespace zigzag
