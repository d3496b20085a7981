// The keys that a block of queries can see, as at most five runs of consecutive rows with consecutive positions.
//
//   cache: [pinned: sink or whole full cache] [window, older part] [window, part after the wrap]     chunk: [pinned]
//   [window]
//
// A pinned run is visible to every later query; any other run only to queries less than `window` positions away. Either
// way one query sees one interval of a run, so a kernel masks by two bounds per query and never looks at a position per
// key.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kv/ring.h"

namespace zigzag {

struct KeyRun {
  bool cached;  // rows of the cache (slots), else columns of the new chunk
  bool pinned;
  int row;       // first slot or column
  int position;  // position of that row
  int count;
};

struct KeyRuns {
  KeyRun runs[5];
  int num_runs = 0;
  int64_t num_keys = 0;
};

// First and one past the last key of run[offset, offset + count) that the query at `position` sees, relative to
// `offset`.
struct KeyInterval {
  int begin, end;
};

constexpr KeyInterval visible_interval(const RingLayout& layout, const KeyRun& run, int offset, int count,
                                       int position) {
  const int first = run.position + offset;
  const int end = std::clamp(position + 1 - first, 0, count);
  const int begin = run.pinned ? 0 : std::clamp(position - layout.window + 1 - first, 0, count);
  return {std::min(begin, end), end};
}

// Keys seen by any query at positions [first_query, last_query], which are `length` or more. The row holds `length`
// tokens, its cache has `slots` slots (0: none), and the chunk's column `pad` sits at position `length`.
KeyRuns visible_runs(const RingLayout& layout, int slots, int length, int pad, int first_query, int last_query);

}  // namespace zigzag
