// A strict reader of JSON (RFC 8259) for plan files: nothing is accepted that the standard refuses, a name may stand
// once in an object, and values nest at most 64 deep.
#pragma once

#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace zigzag {

struct Json {
  enum class Type { kNull, kBool, kInteger, kNumber, kString, kArray, kObject };

  Type type = Type::kNull;
  bool boolean = false;
  double number = 0;  // of kInteger too: a number written without fraction and exponent
  std::string text;   // UTF-8
  std::vector<Json> items;
  std::vector<std::pair<std::string, Json>> members;

  // The member of that name, or nullptr; nullptr on anything but an object.
  const Json* find(std::string_view name) const;
};

// Throws zigzag::Error that names the byte at which `text` stops being JSON.
Json parse_json(std::string_view text);

}  // namespace zigzag
