#include "program.h"

#include <cstdio>
#include <cstdlib>

#include "core/error.h"

namespace zigzag::bench {
namespace {

DType parse_dtype(const std::string& text) {
  if (text == "bf16") return DType::kBFloat16;
  if (text == "fp16") return DType::kFloat16;
  ZZ_CHECK(text == "fp32", "--dtype takes bf16, fp16 or (on the CPU) fp32; got '", text, "'");
  return DType::kFloat32;
}

std::vector<Option> with_common(const std::vector<Option>& options) {
  const char* commit = std::getenv("ZIGZAG_COMMIT");
  std::vector<Option> all = {
      {"device", ZIGZAG_WITH_CUDA ? "cuda" : "cpu", "cpu or cuda"},
      {"threads", "0", "CPU threads; 0: all cores"},
      {"num-q-heads", "32", "list: query heads"},
      {"num-kv-heads", "8", "list: key/value heads; combinations that do not divide are left out"},
      {"head-dim", "128", "list: 64, 80, 96, 128, 256"},
      {"dtype", "bf16", "list: bf16, fp16, fp32 (CPU only)"},
      {"layout", "heads",
       "list: order of the caches in memory: heads [batch, heads, slots, head_dim], tokens [batch, slots, heads, "
       "head_dim]"},
      {"kv-format", "none", "list: none, fp8, int8, int4: how the caches hold keys and values"},
      {"q-len", "1", "list: new tokens per call, 1 to 16"},
      {"csv", "", "file for the results, written anew"},
      {"commit", commit ? commit : "unknown", "name of the measured source; default from ZIGZAG_COMMIT"},
  };
  all.insert(all.begin() + 2, options.begin(), options.end());
  return all;
}

KvFormat parse_kv_format(const std::string& text) {
  for (const KvFormat format : {KvFormat::kPlain, KvFormat::kFp8, KvFormat::kInt8, KvFormat::kInt4}) {
    if (text == name(format)) return format;
  }
  throw Error("--kv-format takes none, fp8, int8 and int4; got '" + text + "'");
}

}  // namespace

std::vector<Cell> shape_axes(const Arguments& arguments) {
  std::vector<Cell> cells;
  const std::string& rope = arguments.text("rope");
  ZZ_CHECK(rope == "on" || rope == "off", "--rope takes on or off; got '", rope, "'");
  for (const std::string& layout : arguments.list("layout")) {
    ZZ_CHECK(layout == "heads" || layout == "tokens", "--layout takes heads or tokens; got '", layout, "'");
  }
  for (const std::string& dtype : arguments.list("dtype")) {
    for (int num_q_heads : arguments.integers("num-q-heads")) {
      for (int num_kv_heads : arguments.integers("num-kv-heads")) {
        if (num_kv_heads == 0 || num_q_heads % num_kv_heads != 0) continue;
        for (int head_dim : arguments.integers("head-dim")) {
          for (int q_len : arguments.integers("q-len")) {
            ZZ_CHECK(q_len >= 1 && q_len <= kMaxDecodeQueries, "--q-len takes 1 to ", kMaxDecodeQueries, "; got ",
                     q_len);
            for (const std::string& layout : arguments.list("layout")) {
              Cell cell = {"", parse_dtype(dtype), num_q_heads, num_kv_heads, head_dim, q_len, 0, 0, rope == "on", {},
                           {}};
              cell.token_major = layout == "tokens";
              for (const std::string& format : arguments.list("kv-format")) {
                cell.kv_format = parse_kv_format(format);
                ZZ_CHECK(!cell.rope || cell.kv_format == KvFormat::kPlain, "--rope on needs --kv-format none");
                cells.push_back(cell);
              }
            }
          }
        }
      }
    }
  }
  ZZ_CHECK(!cells.empty(), "no combination of --num-q-heads and --num-kv-heads divides");
  return cells;
}

std::vector<Job> jobs(const std::vector<Cell>& cells) {
  std::vector<Job> all;
  for (const Cell& cell : cells) {
    all.push_back(
        [cell](Device& device, const Bandwidth& bandwidth, Table& table) { run_cell(device, cell, bandwidth, table); });
  }
  return all;
}

int run_program(int argc, const char* const* argv, const std::string& summary, const std::vector<Option>& options,
                const std::function<std::vector<Job>(const Arguments&)>& make_jobs) {
  try {
    Arguments arguments(summary, with_common(options));
    if (!arguments.parse(argc, argv)) return 0;
    const std::vector<Job> all = make_jobs(arguments);
    const std::unique_ptr<Device> device = open_device(arguments.text("device"), arguments.integer("threads"));
    const Bandwidth bandwidth = measure_bandwidth(*device);
    std::printf(
        "%s, driver %s: copy %.1f GB/s (read + write), pure read %.1f GB/s; buffers rotated over more than 400 MB\n",
        device->name().c_str(), device->driver().c_str(), bandwidth.copy, bandwidth.read);
    Table table(*device, arguments.text("commit"), arguments.text("csv"));
    for (const Job& job : all) job(*device, bandwidth, table);
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
}

}  // namespace zigzag::bench
