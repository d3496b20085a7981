#include "core/env.h"

#include <algorithm>
#include <cstdlib>
#include <string_view>

#include "core/error.h"
#include "core/shown.h"

namespace zigzag {
namespace {

constexpr int kMaxDigits = 6;

bool is_integer(std::string_view text) {
  return !text.empty() && text.size() <= kMaxDigits && text.find_first_not_of("0123456789") == std::string_view::npos;
}

bool allows(std::string_view allowed, std::string_view value) {
  const std::size_t to = allowed.find(" to ");
  if (to != std::string_view::npos) {
    if (!is_integer(value)) return false;
    const int number = std::stoi(std::string(value));
    return number >= std::stoi(std::string(allowed.substr(0, to))) &&
           number <= std::stoi(std::string(allowed.substr(to + 4)));
  }
  while (!allowed.empty()) {
    const std::size_t comma = std::min(allowed.find(", "), allowed.size());
    if (allowed.substr(0, comma) == value) return true;
    allowed.remove_prefix(std::min(comma + 2, allowed.size()));
  }
  return false;
}

}  // namespace

std::string env_text(Env variable) {
  for (const EnvVariable& entry : kEnvVariables) {
    if (entry.id != variable) continue;
    const char* value = std::getenv(entry.name);
    if (value == nullptr || *value == '\0') return "";
    ZZ_CHECK(allows(entry.allowed, value), entry.name, " is '", shown(value), "'; supported: ", entry.allowed);
    return value;
  }
  return "";
}

int env_integer(Env variable) {
  const std::string value = env_text(variable);
  return value.empty() ? 0 : std::stoi(value);
}

}  // namespace zigzag
