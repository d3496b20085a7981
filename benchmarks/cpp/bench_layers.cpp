// One decode step of a model's attention: a chain of layers through the scheduler, on CUDA as one captured graph.
#include <algorithm>

#include "core/error.h"
#include "layers.h"
#include "program.h"

using namespace zigzag;
using namespace zigzag::bench;

namespace {

constexpr const char* kSummary =
    "Times a chain of retrieval and streaming layers, one attention launch each, append included; on CUDA the step is\n"
    "one graph. Rows: op 'step' for the whole chain, op 'layer' for its mean layer. With --gemm the layers are joined\n"
    "by their output and QKV projections, and impl 'difference' is what attention adds to the same graph without it.\n"
    "Example:\n"
    "  bench_layers --device cuda --layers 32 --retrieval 16,8 --kv-len 4K,128K --csv layers.csv\n"
    "  ZIGZAG_DEPENDENT_LAUNCH=1 bench_layers --layers 16 --retrieval 0 --gemm 4096";

// '0' retrieves, '1' streams: the layer strings of the Python package (`zigzag_ext.exchange.to_layer_string`).
std::vector<LayerKind> parse_kinds(const std::string& text) {
  std::vector<LayerKind> kinds;
  for (const char c : text) {
    ZZ_CHECK(c == '0' || c == '1', "--kinds takes one digit per layer, 0 retrieval and 1 streaming; got '", text, "'");
    kinds.push_back(c == '0' ? LayerKind::kRetrieval : LayerKind::kStreaming);
  }
  return kinds;
}

// Spread evenly, as a period cut of the layers.
std::vector<LayerKind> spread_kinds(int layers, int retrieval) {
  ZZ_CHECK(layers >= 1 && retrieval <= layers, "--retrieval takes 0 to --layers = ", layers, "; got ", retrieval);
  std::vector<LayerKind> kinds;
  for (int64_t layer = 0; layer < layers; ++layer) {
    const bool retrieves = (layer + 1) * retrieval / layers > layer * retrieval / layers;
    kinds.push_back(retrieves ? LayerKind::kRetrieval : LayerKind::kStreaming);
  }
  return kinds;
}

std::vector<std::vector<LayerKind>> plans(const Arguments& arguments) {
  std::vector<std::vector<LayerKind>> all;
  if (!arguments.text("kinds").empty()) {
    for (const std::string& kinds : arguments.list("kinds")) all.push_back(parse_kinds(kinds));
    return all;
  }
  for (int retrieval : arguments.integers("retrieval")) {
    all.push_back(spread_kinds(arguments.integer("layers"), retrieval));
  }
  return all;
}

Chain make_chain(const Arguments& arguments, const Cell& shape, const std::vector<LayerKind>& kinds, int batch,
                 const std::string& context) {
  const int kv_len = parse_count(context, "--kv-len");
  ZZ_CHECK(batch >= 1, "--batch takes numbers from 1; got ", batch);
  ZZ_CHECK(kv_len >= shape.q_len, "--kv-len counts the new tokens too: at least q_len = ", shape.q_len, "; got ",
           kv_len);
  Chain chain{"", kinds, shape, shape, arguments.integer("gemm")};
  Cell& ring = chain.streaming;
  ring.sink = arguments.integer("sink"), ring.window = arguments.integer("window");
  ZZ_CHECK(ring.window >= 1, "--window takes numbers from 1; got ", ring.window);
  for (Cell* cell : {&chain.retrieval, &chain.streaming}) {
    cell->kv_lens.assign(static_cast<std::size_t>(batch), kv_len);
    cell->seq_lens.assign(static_cast<std::size_t>(batch), kv_len - shape.q_len);
  }
  const int held = RingLayout{ring.sink, ring.window, 0}.used_slots(kv_len);
  ring.kv_lens.assign(static_cast<std::size_t>(batch), held);
  const auto retrieval = std::count(kinds.begin(), kinds.end(), LayerKind::kRetrieval);
  chain.scenario = concat(batch, "x", context, "_", retrieval, "of", kinds.size(), suffix(shape));
  return chain;
}

std::vector<Job> make_jobs(const Arguments& arguments) {
  std::vector<Job> all;
  for (const Cell& shape : shape_axes(arguments)) {
    ZZ_CHECK(shape.kv_format == KvFormat::kPlain, "bench_layers takes --kv-format none only");
    for (const std::vector<LayerKind>& kinds : plans(arguments)) {
      for (int batch : arguments.integers("batch")) {
        for (const std::string& context : arguments.list("kv-len")) {
          const Chain chain = make_chain(arguments, shape, kinds, batch, context);
          all.push_back([chain](Device& device, const Bandwidth& bandwidth, Table& table) {
            run_chain(device, chain, bandwidth, table);
          });
        }
      }
    }
  }
  return all;
}

}  // namespace

int main(int argc, char** argv) {
  return run_program(
      argc, argv, kSummary,
      {{"batch", "1", "list: rows"},
       {"kv-len", "4K,32K", "list: tokens per row, the new ones included"},
       {"layers", "32", "layers of the chain"},
       {"retrieval", "16", "list: how many of them retrieve, spread evenly"},
       {"kinds", "", "list: layer strings such as 0110: 0 retrieves, 1 streams; replaces the two above"},
       {"sink", "64", "first tokens that a streaming layer keeps"},
       {"window", "256", "last tokens that a streaming layer keeps"},
       {"rope", "on", "on: the op also rotates queries and keys"},
       {"gemm", "0", "width of the model: projections between the layers, by cuBLAS; 0: attention alone"}},
      make_jobs);
}
