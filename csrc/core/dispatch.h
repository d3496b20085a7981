// From run-time shape to compiled template: calls f with the value as a compile-time constant.
#pragma once

#include <type_traits>

#include "core/error.h"
#include "core/types.h"

namespace zigzag {

template <int kValue>
using Int = std::integral_constant<int, kValue>;

// f(Int<head_dim>{}); check_params has already rejected every head_dim that is not in kHeadDims.
template <class F>
void dispatch_head_dim(int head_dim, F&& f) {
  switch (head_dim) {
    case 64: return f(Int<64>{});
    case 80: return f(Int<80>{});
    case 96: return f(Int<96>{});
    case 128: return f(Int<128>{});
    case 192: return f(Int<192>{});
    case 256: return f(Int<256>{});
    case 512: return f(Int<512>{});
    default: throw Error(concat("head_dim ", head_dim, " has no compiled kernel"));
  }
}

template <class F>
void dispatch_bool(bool value, F&& f) {
  if (value) {
    f(std::true_type{});
  } else {
    f(std::false_type{});
  }
}

}  // namespace zigzag
