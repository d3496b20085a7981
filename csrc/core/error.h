// The one exception type of the core, and the checks that throw it.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace zigzag {

// Thrown for every bad argument and every failed CUDA call. The bindings turn it into a Python ValueError or RuntimeError.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Joins its arguments into one string, as operator<< prints them.
template <class... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

}  // namespace zigzag

// Throws zigzag::Error built from the remaining arguments unless `condition` holds. The message says what is allowed
// and what was given; the condition itself never reaches the user.
#define ZZ_CHECK(condition, ...)                                   \
  do {                                                             \
    if (!(condition)) throw ::zigzag::Error(::zigzag::concat(__VA_ARGS__)); \
  } while (false)
