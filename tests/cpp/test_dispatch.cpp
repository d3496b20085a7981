// Which kernel serves which shape, and that every parameter no kernel supports is refused with what was given.
#include <doctest/doctest.h>

#include <string>
#include <vector>

#include "core/dispatch.h"
#include "error_text.h"
#include "kernels/attention.h"
#include "kernels/decode/full/workspace.h"

namespace {

using namespace zigzag;
using zigzag::testing::error_of;

AttentionParams good_attention() {
  AttentionParams params{};
  params.batch = 1;
  params.num_q_heads = 8;
  params.num_kv_heads = 2;
  params.q_len = 1;
  params.head_dim = 128;
  params.slots = 320;
  params.sink = 64;
  params.window = 256;
  params.scale = 1.0f;
  params.dtype = DType::kFloat32;
  return params;
}

AppendParams good_append() {
  AppendParams params{};
  params.batch = 1;
  params.num_kv_heads = 2;
  params.q_len = 1;
  params.head_dim = 128;
  params.slots = 320;
  params.sink = 64;
  params.window = 256;
  params.dtype = DType::kFloat32;
  return params;
}

void check_mentions(const std::string& message, const std::vector<std::string>& parts) {
  for (const std::string& part : parts) {
    CAPTURE(message);
    CAPTURE(part);
    CHECK(message.find(part) != std::string::npos);
  }
}

}  // namespace

TEST_CASE("select_attention_kernel: the window picks the cache, q_len picks decode or prefill") {
  for (int q_len = 1; q_len <= kMaxDecodeQueries; ++q_len) {
    CHECK(select_attention_kernel(0, q_len) == AttentionKernel::kDecodeFull);
    CHECK(select_attention_kernel(1, q_len) == AttentionKernel::kDecodeStream);
    CHECK(select_attention_kernel(256, q_len) == AttentionKernel::kDecodeStream);
  }
  for (int q_len : {kMaxDecodeQueries + 1, 1000, 1 << 20}) {
    CHECK(select_attention_kernel(0, q_len) == AttentionKernel::kPrefill);
    CHECK(select_attention_kernel(256, q_len) == AttentionKernel::kPrefill);
  }
}

TEST_CASE("dispatch_head_dim: reaches every supported head_dim as a constant, and throws for others") {
  for (int head_dim : kHeadDims) {
    int reached = 0;
    dispatch_head_dim(head_dim, [&](auto constant) { reached = decltype(constant)::value; });
    CHECK(reached == head_dim);
  }
  check_mentions(error_of([] { dispatch_head_dim(72, [](auto) {}); }), {"72"});
}

TEST_CASE("check_params: accepts what the kernels serve") {
  for (int head_dim : kHeadDims) {
    for (int group = 1; group <= kMaxGroupSize; ++group) {
      AttentionParams params = good_attention();
      params.head_dim = head_dim;
      params.num_q_heads = group * params.num_kv_heads;
      CHECK_NOTHROW(check_params(params));
    }
  }
  AttentionParams full = good_attention();
  full.window = 0;
  full.slots = 1 << 20;
  CHECK_NOTHROW(check_params(full));
  AttentionParams nothing_cached = good_attention();
  nothing_cached.slots = 0;
  CHECK_NOTHROW(check_params(nothing_cached));
  CHECK_NOTHROW(check_params(good_append()));
}

void set_tables(AttentionParams& p, int dim, DType dtype) {
  p.rotary.cos = p.rotary.sin = &p;
  p.rotary.dim = dim, p.rotary.dtype = dtype;
}

TEST_CASE("check_params: names what was given and what is supported") {
  struct Case {
    const char* what;
    void (*spoil)(AttentionParams&);
    std::vector<std::string> mentions;
  };
  const std::vector<Case> cases = {
      {"head_dim", [](AttentionParams& p) { p.head_dim = 72; }, {"head_dim 72", "64, 80, 96, 128, 192, 256, 512"}},
      {"head_dim 0", [](AttentionParams& p) { p.head_dim = 0; }, {"head_dim 0"}},
      {"heads not a multiple",
       [](AttentionParams& p) { p.num_q_heads = 7; },
       {"multiple", "7 query heads", "2 KV heads"}},
      {"group too large",
       [](AttentionParams& p) { p.num_q_heads = 34; },
       {"at most 16", "34 query heads", "2 KV heads"}},
      {"no KV heads", [](AttentionParams& p) { p.num_kv_heads = 0; }, {"0 KV heads"}},
      {"no query heads", [](AttentionParams& p) { p.num_q_heads = 0; }, {"0 query heads"}},
      {"negative query heads", [](AttentionParams& p) { p.num_q_heads = -8; }, {"-8 query heads"}},
      {"sink", [](AttentionParams& p) { p.sink = -1; }, {"sink", "-1"}},
      {"window", [](AttentionParams& p) { p.window = -2; }, {"window", "-2"}},
      {"ring slots", [](AttentionParams& p) { p.slots = 319; }, {"320 slots", "319"}},
      {"cos alone",
       [](AttentionParams& p) { p.rotary.cos = &p, p.rotary.dim = 8; },
       {"cos and sin", "both or neither"}},
      {"tables without a size", [](AttentionParams& p) { p.rotary.cos = p.rotary.sin = &p; }, {"both or neither"}},
      {"rotary_dim 20", [](AttentionParams& p) { set_tables(p, 20, p.dtype); }, {"multiple of 8", "got 20"}},
      {"rotary_dim 264", [](AttentionParams& p) { set_tables(p, 264, p.dtype); }, {"at most head_dim", "got 264"}},
      {"dtype of the tables",
       [](AttentionParams& p) { set_tables(p, 64, p.dtype == DType::kFloat16 ? DType::kBFloat16 : DType::kFloat16); },
       {"float32 or have the dtype of q", "float16"}},
      {"RoPE of a prefill",
       [](AttentionParams& p) { set_tables(p, 64, p.dtype), p.q_len = 17; },
       {"up to 16 new tokens", "got 17"}},
  };
  for (const Case& c : cases) {
    CAPTURE(c.what);
    AttentionParams params = good_attention();
    c.spoil(params);
    check_mentions(error_of([&] { check_params(params); }), c.mentions);
    check_mentions(error_of([&] { attention_cpu(params, ParallelFor{}); }), c.mentions);
  }
}

TEST_CASE("check_params: append and merge refuse their own fields") {
  AppendParams append = good_append();
  append.slots = 100;
  check_mentions(error_of([&] { append_cpu(append, ParallelFor{}); }), {"320 slots", "100"});
  append = good_append();
  append.head_dim = 127;
  check_mentions(error_of([&] { append_cpu(append, ParallelFor{}); }), {"head_dim 127", "128"});
  MergeParams merge{};
  merge.rows = 1;
  merge.head_dim = 640;
  check_mentions(error_of([&] { merge_states_cpu(merge, ParallelFor{}); }), {"head_dim 640", "512"});
}

TEST_CASE("attention_workspace_bytes: enough for the largest head_dim, known without a GPU") {
  for (const int head_dim : kHeadDims) CHECK(attention_workspace_bytes() >= decode_full::workspace_bytes(head_dim));
}

#if !ZIGZAG_WITH_CUDA
TEST_CASE("a build without CUDA says so instead of doing nothing") {
  check_mentions(error_of([] { attention_cuda(good_attention(), nullptr); }), {"no CUDA kernels", "ZIGZAG_CUDA=on"});
  check_mentions(error_of([] { append_cuda(good_append(), nullptr); }), {"no CUDA kernels"});
}
#else
TEST_CASE("CUDA refuses float32 before it launches anything") {
  check_mentions(error_of([] { attention_cuda(good_attention(), nullptr); }), {"float32", "float16, bfloat16"});
  check_mentions(error_of([] { append_cuda(good_append(), nullptr); }), {"float32", "float16, bfloat16"});
}
#endif
