// What the decode benchmarks share: the common options, and the loop over cells.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "arguments.h"
#include "cell.h"

namespace zigzag::bench {

// One measurement: checks, times and reports.
using Job = std::function<void(Device& device, const Bandwidth& bandwidth, Table& table)>;

// Parses the command line with `options` added to the common ones, makes the jobs, runs them. Returns the exit status
// of main: 0, or 1 after printing the reason to stderr.
int run_program(int argc, const char* const* argv, const std::string& summary, const std::vector<Option>& options,
                const std::function<std::vector<Job>(const Arguments&)>& make_jobs);

// The job that every cell of a decode benchmark is.
std::vector<Job> jobs(const std::vector<Cell>& cells);

// Cells of every combination of the common axes; batch, lengths, sink, window and the name are left to the caller, who
// ends the name with suffix(cell).
std::vector<Cell> shape_axes(const Arguments& arguments);

inline std::string suffix(const Cell& cell) {
  return std::string(cell.rope ? "_rope" : "") + (cell.token_major ? "_tokens" : "");
}

}  // namespace zigzag::bench
