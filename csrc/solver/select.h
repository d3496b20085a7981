// The exact search under every objective and constraint: one dynamic program over the layers.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

namespace zigzag::solver {

// Compared and added part by part: the second part decides between equal first parts.
struct Value {
  int64_t first = 0;
  int64_t second = 0;
};

inline Value operator+(Value a, Value b) { return {a.first + b.first, a.second + b.second}; }
inline bool operator==(Value a, Value b) { return a.first == b.first && a.second == b.second; }
inline bool operator<(Value a, Value b) { return a.first != b.first ? a.first < b.first : a.second < b.second; }

// What a choice is worth, the larger the better:
//   sum of gains[l] over the retrieval layers  -  sum over all l of |targets[l] - step * (retrieval layers in 0..l)|.
// Where exposures are given, the largest exposure of a streaming layer is made as small as possible before that.
struct Goal {
  std::vector<Value> gains;      // [layers]
  std::vector<int64_t> targets;  // [layers], or empty; needs Limits::count
  int64_t step = 0;
  std::vector<int64_t> exposures;  // [layers] >= 0, or empty
};

// Which choices are allowed.
struct Limits {
  int layers = 0;
  std::optional<int> count;     // exactly so many retrieval layers
  std::vector<int64_t> costs;   // [layers] of retrieval over streaming, any sign, or empty
  int64_t cost_limit = 0;       // their sum over the retrieval layers is at most this
  std::vector<bool> retrieval;  // [layers] forced
  std::vector<bool> streaming;  // [layers] forced
  std::optional<int> max_streaming_run;
  std::vector<int> stages;  // layers per stage, or empty: equal numbers of retrieval layers in all of them
};

struct Selection {
  std::vector<bool> retrieval;  // [layers]
  Value value;
  int64_t exposure = 0;  // largest of a streaming layer, 0 where there is none
};

// The best allowed choice, or nothing where none is allowed. Of equally good ones, the one whose first difference is a
// retrieval layer.
std::optional<Selection> select(const Goal& goal, const Limits& limits);

}  // namespace zigzag::solver
