// How CPU kernels get threads: the caller hands in a parallel-for, so that torch's pool, or a pool of a C++ program's
// own, runs them and no second thread pool competes for the cores.
#pragma once

#include <cstdint>
#include <functional>

namespace zigzag {

struct ParallelFor {
  int num_threads = 1;
  // Runs body(begin, end) over disjoint ranges that cover [0, count), possibly at the same time; returns when all are
  // done. An exception in a body reaches the caller.
  std::function<void(int64_t count, const std::function<void(int64_t, int64_t)>& body)> run =
      [](int64_t count, const std::function<void(int64_t, int64_t)>& body) {
        if (count > 0) body(0, count);
      };
};

}  // namespace zigzag
