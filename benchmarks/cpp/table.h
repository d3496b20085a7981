// Results: one row per measurement, to the screen and to a CSV file.
#pragma once

#include <cstdio>
#include <memory>
#include <string>

#include "device.h"

namespace zigzag::bench {

struct Row {
  std::string op, impl, scenario, kv_format;
  int batch, num_q_heads, num_kv_heads, head_dim, q_len, kv_len, sink, window;
  Quantiles time;       // microseconds per call
  int64_t bytes;        // K and V of the attended keys
  double copy_gbps;     // measured in this run
  double percent_read;  // time of a pure read of the same bytes / time of this
  double error;         // relative, against double precision
};

class Table {
 public:
  // Writes `csv` anew unless it is empty. `commit` names the measured source.
  Table(const Device& device, std::string commit, const std::string& csv);

  void add(const Row& row);

 private:
  std::string gpu_, driver_, commit_;
  std::unique_ptr<std::FILE, int (*)(std::FILE*)> file_;
};

}  // namespace zigzag::bench
