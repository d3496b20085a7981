// What the decode benchmarks share: the common options, and the loop over cells.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "arguments.h"
#include "cell.h"

namespace zigzag::bench {

// Parses the command line with `options` added to the common ones, builds the cells, runs them. Returns the exit status
// of main: 0, or 1 after printing the reason to stderr.
int run_program(int argc, const char* const* argv, const std::string& summary, const std::vector<Option>& options,
                const std::function<std::vector<Cell>(const Arguments&)>& make_cells);

// Cells of every combination of the common axes; batch, lengths, sink, window and the name are left to the caller, who
// ends the name with rope_suffix(cell).
std::vector<Cell> shape_axes(const Arguments& arguments);

inline const char* rope_suffix(const Cell& cell) { return cell.rope ? "_rope" : ""; }

}  // namespace zigzag::bench
