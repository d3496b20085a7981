// The CPU attention behind all three ops; they differ only in how many tokens one block of query rows holds.
//
// A task is (row b, KV head, block of query tokens, split of the keys that the block sees). The block's rows are its
// tokens times the query heads of the group, so each key is read once for all of them. Threads take tasks from a
// counter. A block whose keys are not split writes its output at once; else the last task of (b, KV head) to finish
// merges the splits, in their order. That task also appends, since nobody reads the cache any more. Splits depend on
// the shapes alone, so the result does not depend on the number of threads; scratch is O(threads + splits).
#pragma once

#include <atomic>
#include <cmath>
#include <memory>

#include "core/parallel.h"
#include "core/params.h"
#include "cpu/buffer.h"
#include "cpu/tile.h"
#include "kernels/append/append_cpu.h"
#include "kernels/cpu/kv_rows.h"
#include "kernels/cpu/rotary.h"
#include "kv/key_runs.h"

namespace zigzag::ZIGZAG_CPU_ISA {

inline constexpr int kMinSplitKeys = 256;  // below this a merge costs more than another thread gains
inline constexpr int kTargetTasks = 128;   // enough for 64 threads to end at about the same time
inline constexpr float kLog2e = 1.44269504088896341f;
inline constexpr int kDirectRows = 8;  // up to here keys are converted where they are used, above once per tile

// Where row b's tasks and partial states start, and how its keys are split.
struct RowPlan {
  int64_t first_task, first_partial;
  int splits, split_keys;
};

struct AttentionPlan {
  int group, block_tokens, blocks;
  int64_t partial_floats;  // one partial state: out [rows, head_dim], max [rows], sum [rows]
  int64_t num_tasks = 0, num_partials = 0;
  Buffer<RowPlan> rows;  // [batch + 1], the last one an end marker
};

inline AttentionPlan make_plan(const AttentionParams& p, int block_tokens) {
  AttentionPlan plan;
  plan.group = p.num_q_heads / p.num_kv_heads;
  plan.block_tokens = block_tokens;
  plan.blocks = (p.q_len + block_tokens - 1) / block_tokens;
  plan.partial_floats = static_cast<int64_t>(block_tokens) * plan.group * (p.head_dim + 2);
  plan.rows = allocate<RowPlan>(p.batch + 1);
  const int tasks_per_split = p.num_kv_heads * plan.blocks;
  const auto most_keys = [&](int b) {
    const int64_t cached = std::min(chunk_row(p, b).length, p.slots), all = cached + p.q_len;
    return p.window == 0 ? all : std::min<int64_t>(all, static_cast<int64_t>(p.sink) + p.window + block_tokens);
  };
  int64_t work = 0;
  for (int b = 0; b < p.batch; ++b) work += most_keys(b) * tasks_per_split;
  const int64_t target = std::max<int64_t>(kMinSplitKeys, work / kTargetTasks);
  for (int b = 0; b < p.batch; ++b) {
    const int64_t keys = most_keys(b), wanted = std::max<int64_t>(1, keys / target);
    const int64_t split_keys = ((keys + wanted - 1) / wanted + kTileKeys - 1) / kTileKeys * kTileKeys;
    const int splits = static_cast<int>((keys + split_keys - 1) / split_keys);
    plan.rows[b] = {plan.num_tasks, plan.num_partials, splits, static_cast<int>(split_keys)};
    plan.num_tasks += static_cast<int64_t>(tasks_per_split) * splits;
    if (splits > 1) plan.num_partials += static_cast<int64_t>(tasks_per_split) * splits;
  }
  plan.rows[p.batch] = {plan.num_tasks, plan.num_partials, 0, 0};
  return plan;
}

// One thread's scratch.
struct Worker {
  RowBlock block;
  Buffer<float> floats;
  Buffer<TileInterval> intervals;
  float* own_state;  // out, max, sum of a block whose keys are not split
  float *k_tile, *v_tile;

  Worker(int max_rows, int head_dim, bool needs_tile) {
    const int64_t tile = needs_tile ? static_cast<int64_t>(kTileKeys) * head_dim : 0;
    const int64_t matrix = static_cast<int64_t>(max_rows) * head_dim;
    const int64_t scores = static_cast<int64_t>(max_rows) * kScorePitch;
    floats = allocate<float>(2 * tile + 2 * matrix + scores + 3 * max_rows);
    intervals = allocate<TileInterval>(max_rows);
    k_tile = floats.get();
    v_tile = k_tile + tile;
    block = {};
    block.head_dim = head_dim;
    block.q = v_tile + tile;
    block.scores = block.q + matrix;
    own_state = block.scores + scores;
    block.decay = own_state + matrix + 2 * max_rows;
    block.interval = intervals.get();
  }

  void use_state(float* state, int rows) {
    block.rows = rows;
    block.out = state;
    block.max = state + static_cast<int64_t>(rows) * block.head_dim;
    block.sum = block.max + rows;
  }
};

template <class T>
class CpuAttention {
 public:
  CpuAttention(const AttentionParams& params, const ParallelFor& parallel, int block_tokens)
      : p_(params),
        k_(p_, p_.k_store, p_.k_cache, p_.k_cache_stride, p_.k_new, p_.k_new_stride, parallel),
        v_(p_, p_.v_store, p_.v_cache, p_.v_cache_stride, p_.v_new, p_.v_new_stride, parallel),
        plan_(make_plan(params, block_tokens)),
        partials_(allocate<float>(plan_.num_partials * plan_.partial_floats)),
        unfinished_(new std::atomic<int>[static_cast<std::size_t>(params.batch) * params.num_kv_heads]) {
    for (int b = 0; b < p_.batch; ++b) {
      for (int head = 0; head < p_.num_kv_heads; ++head) {
        unfinished_[b * p_.num_kv_heads + head] = plan_.blocks * plan_.rows[b].splits;
      }
    }
  }

  void run(const ParallelFor& parallel) {
    const int64_t threads = std::min<int64_t>(std::max(1, parallel.num_threads), plan_.num_tasks);
    parallel.run(threads, [this](int64_t, int64_t) { work(); });
  }

 private:
  struct Task {
    int b, head, block, split;
  };

  // Blocks of the longest causal prefix come first, so that no thread starts a long task at the end.
  Task task(int64_t index) const {
    int b = 0;
    while (index >= plan_.rows[b + 1].first_task) ++b;
    index -= plan_.rows[b].first_task;
    const int splits = plan_.rows[b].splits, split = static_cast<int>(index % splits);
    const int head = static_cast<int>(index / splits % p_.num_kv_heads);
    const int block = static_cast<int>(index / splits / p_.num_kv_heads);
    return {b, head, plan_.blocks - 1 - block, split};
  }

  int block_rows(int block) const {
    return std::min(plan_.block_tokens, p_.q_len - block * plan_.block_tokens) * plan_.group;
  }

  int query_head(const Task& t, int row) const { return p_.heads(t.head) * plan_.group + row % plan_.group; }

  float* partial(const Task& t) const {
    const RowPlan& row = plan_.rows[t.b];
    const int64_t index = (static_cast<int64_t>(t.head) * plan_.blocks + t.block) * row.splits + t.split;
    return partials_.get() + (row.first_partial + index) * plan_.partial_floats;
  }

  void work() {
    const int max_rows = std::min(plan_.block_tokens, p_.q_len) * plan_.group;
    Worker worker(max_rows, p_.head_dim, max_rows > kDirectRows || !plain());
    for (int64_t index; (index = next_task_.fetch_add(1, std::memory_order_relaxed)) < plan_.num_tasks;) {
      const Task t = task(index);
      const bool split = plan_.rows[t.b].splits > 1;
      worker.use_state(split ? partial(t) : worker.own_state, block_rows(t.block));
      worker.block.softcap = p_.softcap * kLog2e;
      attend(t, worker);
      if (!split) write_block(t, worker.block);
      if (unfinished_[t.b * p_.num_kv_heads + t.head].fetch_sub(1, std::memory_order_acq_rel) > 1) continue;
      if (split) merge_splits(t, worker);
      append_head(p_, t.b, t.head);
    }
  }

  void attend(const Task& t, Worker& worker) const {
    const RowBlock& block = worker.block;
    reset(block);
    const auto [cache_row, length, pad] = chunk_row(p_, t.b);
    const int first_column = t.block * plan_.block_tokens;
    const int end_column = first_column + block.rows / plan_.group;
    if (end_column <= pad) return;
    load_queries(t, block);
    const int first_query = length + std::max(first_column, pad) - pad;
    const int last_query = length + end_column - 1 - pad;
    const RingLayout layout{p_.sink, p_.window, p_.slots};
    const KeyRuns keys = visible_runs(layout, p_.slots, length, pad, first_query, last_query);
    const int64_t split_begin = static_cast<int64_t>(t.split) * plan_.rows[t.b].split_keys;
    const int64_t split_end = std::min<int64_t>(keys.num_keys, split_begin + plan_.rows[t.b].split_keys);
    int64_t run_begin = 0;
    for (int i = 0; i < keys.num_runs; run_begin += keys.runs[i].count, ++i) {
      const KeyRun& run = keys.runs[i];
      const int begin = static_cast<int>(std::clamp<int64_t>(split_begin - run_begin, 0, run.count));
      const int end = static_cast<int>(std::clamp<int64_t>(split_end - run_begin, 0, run.count));
      for (int key = begin; key < end; key += kTileKeys) {
        const int count = std::min(kTileKeys, end - key);
        for (int r = 0; r < block.rows; ++r) {
          const int column = first_column + r / plan_.group;
          const KeyInterval seen = visible_interval(layout, run, key, count, length + column - pad);
          block.interval[r] = column < pad ? TileInterval{0, 0} : TileInterval{seen.begin, seen.end};
        }
        attend_keys(t, worker, run.cached, run.cached ? cache_row : t.b, run.row + key, count);
      }
    }
  }

  // q * scale * log2(e), rows ordered by token, then by query head of the group.
  void load_queries(const Task& t, const RowBlock& block) const {
    const Vec factor = Vec::fill(p_.scale * kLog2e);
    for (int r = 0; r < block.rows; ++r) {
      const int column = t.block * plan_.block_tokens + r / plan_.group, head = query_head(t, r);
      const T* q = static_cast<const T*>(p_.q) + offset(p_.q_stride, t.b, head, column);
      for (int x = 0; x < p_.head_dim; x += Vec::kWidth)
        (Vec::load(q + x) * factor).store(block.q + r * p_.head_dim + x);
    }
  }

  bool plain() const { return k_.is_plain() && v_.is_plain(); }

  // Keys [key, key + count) of cache row or batch row `row`.
  void attend_keys(const Task& t, Worker& worker, bool cached, int row, int key, int count) const {
    const VectorRows k = k_.rows(cached, row, t.head, key), v = v_.rows(cached, row, t.head, key);
    if (worker.block.rows <= kDirectRows && plain()) {
      constexpr int64_t kSize = sizeof(T);
      const auto elements = [](const char* data) { return reinterpret_cast<const T*>(data); };
      return attend_tile(worker.block, elements(k.data), k.stride / kSize, elements(v.data), v.stride / kSize,
                         elements(k.data + kTileKeys * k.stride));
    }
    widen_rows<T>(k, count, p_.head_dim, worker.k_tile);
    widen_rows<T>(v, count, p_.head_dim, worker.v_tile);
    attend_tile<float>(worker.block, worker.k_tile, p_.head_dim, worker.v_tile, p_.head_dim, nullptr);
  }

  void merge_splits(const Task& t, Worker& worker) const {
    const int splits = plan_.rows[t.b].splits;
    for (int b = 0; b < plan_.blocks; ++b) {
      const int rows = block_rows(b);
      worker.use_state(worker.own_state, rows);
      const RowBlock& block = worker.block;
      reset(block);
      for (int s = 0; s < splits; ++s) {
        const float* out = partial({t.b, t.head, b, s});
        const float* max = out + static_cast<int64_t>(rows) * p_.head_dim;
        for (int r = 0; r < rows; ++r) {
          const float high = std::max(block.max[r], max[r]);
          const float old_weight = exp2(block.max[r] - high), weight = exp2(max[r] - high);
          block.sum[r] = block.sum[r] * old_weight + max[rows + r] * weight;
          block.max[r] = high;
          float* to = block.out + r * p_.head_dim;
          for (int x = 0; x < p_.head_dim; x += Vec::kWidth) {
            const Vec more = Vec::load(out + r * p_.head_dim + x) * Vec::fill(weight);
            Vec::fma(Vec::load(to + x), Vec::fill(old_weight), more).store(to + x);
          }
        }
      }
      write_block({t.b, t.head, b, 0}, block);
    }
  }

  void write_block(const Task& t, const RowBlock& block) const {
    for (int r = 0; r < block.rows; ++r) {
      const int column = t.block * plan_.block_tokens + r / plan_.group, head = query_head(t, r);
      const bool empty = block.sum[r] == 0.0f;
      float max = block.max[r], sum = block.sum[r], weight = 1.0f;
      if (p_.sink_logits != nullptr && !empty) {
        const float logit = p_.sink_logits[head] * kLog2e, high = std::max(max, logit);
        weight = exp2(max - high);
        sum = sum * weight + exp2(logit - high);
        max = high;
      }
      const Vec factor = Vec::fill(empty ? 0.0f : weight / sum);
      T* out = static_cast<T*>(p_.out) + offset(p_.out_stride, t.b, head, column);
      for (int x = 0; x < p_.head_dim; x += Vec::kWidth) {
        (Vec::load(block.out + r * p_.head_dim + x) * factor).store(out + x);
      }
      p_.lse[(static_cast<int64_t>(t.b) * p_.lse_heads(plan_.group) + head) * p_.q_len + column] =
          empty ? -INFINITY : (max + std::log2(sum)) * 0.693147180559945309f;
    }
  }

  const AttentionParams& p_;
  const KvRows k_, v_;
  const AttentionPlan plan_;
  const Buffer<float> partials_;
  const std::unique_ptr<std::atomic<int>[]> unfinished_;  // [batch, num_kv_heads] tasks
  std::atomic<int64_t> next_task_{0};
};

// Attention, then append, with `block_tokens` query tokens per block of rows.
inline void attention_blocks(const AttentionParams& p, const ParallelFor& parallel, int block_tokens) {
  dispatch_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    if (p.rotary.dim == 0) return CpuAttention<T>(p, parallel, block_tokens).run(parallel);
    const RotatedInputs<T> rotated(p, parallel);
    const AttentionParams after_rope = rotated.params();
    CpuAttention<T>(after_rope, parallel, block_tokens).run(parallel);
  });
}

}  // namespace zigzag::ZIGZAG_CPU_ISA
