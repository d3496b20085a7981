// Decode attention over a full cache (retrieval layers), append included.
#include "core/error.h"
#include "program.h"

using namespace zigzag::bench;

namespace {

constexpr const char* kSummary =
    "Times decode attention over a full KV cache, one launch per call, append included. Each cell is checked against "
    "double\n"
    "precision first; caches are cold. Example:\n"
    "  bench_decode --device cuda --batch 1,8 --kv-len 4K,32K --num-q-heads 32 --num-kv-heads 8 --csv decode.csv";

// "1x64K+31x4K": one row of 64K keys and 31 rows of 4K.
std::vector<int> parse_ragged(const std::string& text) {
  std::vector<int> kv_lens;
  for (const std::string& part : split(text, '+')) {
    const std::vector<std::string> sides = split(part, 'x');
    ZZ_CHECK(sides.size() == 2, "--ragged takes rows x length, joined by +, such as 1x64K+31x4K; got '", text, "'");
    kv_lens.insert(kv_lens.end(), static_cast<std::size_t>(parse_count(sides[0], "--ragged")),
                   parse_count(sides[1], "--ragged"));
  }
  return kv_lens;
}

Cell with_lengths(Cell cell, const std::string& scenario, std::vector<int> kv_lens) {
  cell.scenario = scenario + suffix(cell), cell.kv_lens = std::move(kv_lens);
  for (int kv_len : cell.kv_lens) {
    ZZ_CHECK(kv_len >= cell.q_len, "kv_len counts the new tokens too: at least q_len = ", cell.q_len, "; got ", kv_len);
    cell.seq_lens.push_back(kv_len - cell.q_len);
  }
  ZZ_CHECK(!cell.kv_lens.empty(), "a batch needs at least one row");
  return cell;
}

std::vector<Job> make_jobs(const Arguments& arguments) {
  std::vector<Cell> cells;
  for (const Cell& shape : shape_axes(arguments)) {
    if (!arguments.text("ragged").empty()) {
      for (const std::string& ragged : arguments.list("ragged")) {
        cells.push_back(with_lengths(shape, ragged, parse_ragged(ragged)));
      }
      continue;
    }
    for (int batch : arguments.integers("batch")) {
      for (const std::string& kv_len : arguments.list("kv-len")) {
        std::vector<int> kv_lens(static_cast<std::size_t>(batch), parse_count(kv_len, "--kv-len"));
        cells.push_back(with_lengths(shape, std::to_string(batch) + "x" + kv_len, std::move(kv_lens)));
      }
    }
  }
  return jobs(cells);
}

}  // namespace

int main(int argc, char** argv) {
  return run_program(
      argc, argv, kSummary,
      {{"batch", "1", "list: rows"},
       {"kv-len", "4K,32K", "list: keys per row, the new tokens included"},
       {"ragged", "", "list: batches of unequal rows such as 1x64K+31x4K; replaces --batch and --kv-len"},
       {"rope", "off", "on: the op also rotates queries and keys"}},
      make_jobs);
}
