// Threads for C++ programs that have no pool of their own: tests and benchmarks.
#pragma once

#include "core/parallel.h"

namespace zigzag {

// A parallel-for over `num_threads` threads, the caller included. Copies share the threads, which end with the last
// copy. Calls from several threads run one after the other; a call from inside a body is not allowed.
ParallelFor make_thread_pool(int num_threads);

}  // namespace zigzag
