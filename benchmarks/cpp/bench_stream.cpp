// Decode attention over a sink + window ring (streaming layers), append included.
#include "core/error.h"
#include "program.h"

using namespace zigzag::bench;

namespace {

constexpr const char* kSummary =
    "Times decode attention over a sink + window ring, one launch per call, RoPE and append included. Each cell is "
    "checked "
    "against\n"
    "double precision first; caches are cold. Example:\n"
    "  bench_stream --device cuda --batch 1,64 --sink 64 --window 256,1024 --csv stream.csv";

std::vector<Job> make_jobs(const Arguments& arguments) {
  std::vector<Cell> cells;
  for (const Cell& shape : shape_axes(arguments)) {
    for (int batch : arguments.integers("batch")) {
      for (int sink : arguments.integers("sink")) {
        for (int window : arguments.integers("window")) {
          ZZ_CHECK(batch >= 1 && window >= 1, "--batch and --window take numbers from 1; got ", batch, " and ", window);
          Cell cell = shape;
          cell.scenario = "ring_" + std::to_string(sink) + "+" + std::to_string(window) + suffix(cell);
          cell.sink = sink, cell.window = window;
          cell.kv_lens.assign(static_cast<std::size_t>(batch), sink + window);
          // Wrapped a few times and not aligned to anything: the usual state of a long generation.
          cell.seq_lens.assign(static_cast<std::size_t>(batch), sink + 3 * window + window / 3);
          for (int slack : arguments.integers("slack")) {
            ZZ_CHECK(slack >= 0, "--slack takes numbers from 0; got ", slack);
            cells.push_back(cell);
            cells.back().slack = slack;
            if (slack > 0) cells.back().scenario += "_slack" + std::to_string(slack);
          }
        }
      }
    }
  }
  return jobs(cells);
}

}  // namespace

int main(int argc, char** argv) {
  return run_program(argc, argv, kSummary,
                     {{"batch", "1", "list: rows"},
                      {"sink", "64", "list: first tokens kept"},
                      {"window", "256,1024", "list: last tokens kept"},
                      {"slack", "0", "list: slots beyond sink + window"},
                      {"rope", "on", "on: the op also rotates queries and keys"}},
                     make_jobs);
}
