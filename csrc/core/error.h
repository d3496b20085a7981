// The one exception type of the core, and the checks that throw it.
#pragma once

#include <cstdio>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>

namespace zigzag {

// Thrown for every bad argument and every failed CUDA call. The bindings turn it into a Python ValueError or
// RuntimeError.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

namespace detail {

inline std::string to_text(std::string_view part) { return std::string(part); }

template <class Number, class = std::enable_if_t<std::is_arithmetic_v<Number>>>
std::string to_text(Number part) {
  if constexpr (std::is_floating_point_v<Number>) {
    char text[32];
    std::snprintf(text, sizeof(text), "%g", static_cast<double>(part));
    return text;
  } else {
    return std::to_string(part);
  }
}

}  // namespace detail

// Joins strings and numbers into one string. Without iostreams: where the compiler links libstdc++ statically, the
// std::locale::id symbols of that copy, which are unique in a process, are bound to the libstdc++.so that torch has
// loaded, whose facets are numbered otherwise, and a stream prints a number through the wrong facet and crashes.
template <class... Parts>
std::string concat(const Parts&... parts) {
  std::string text;
  (text.append(detail::to_text(parts)), ...);
  return text;
}

}  // namespace zigzag

// Throws zigzag::Error built from the remaining arguments unless `condition` holds. The message says what is allowed
// and what was given; the condition itself never reaches the user.
#define ZZ_CHECK(condition, ...)                                            \
  do {                                                                      \
    if (!(condition)) throw ::zigzag::Error(::zigzag::concat(__VA_ARGS__)); \
  } while (false)
