#include "engine/json.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <set>

#include "core/error.h"

namespace zigzag {
namespace {

constexpr int kMaxDepth = 64;

class Parser {
 public:
  explicit Parser(std::string_view text) : text_(text) {}

  Json document() {
    Json value = read(0);
    skip_space();
    if (at_ != text_.size()) fail("one value");
    return value;
  }

 private:
  [[noreturn]] void fail(const char* expected) const {
    throw Error(concat("it is not JSON: expected ", expected, " at byte ", at_));
  }

  char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }
  bool accept(std::string_view token) {
    if (text_.substr(at_, token.size()) != token) return false;
    at_ += token.size();
    return true;
  }
  void expect(std::string_view token, const char* expected) {
    if (!accept(token)) fail(expected);
  }
  void skip_space() { at_ = std::min(text_.find_first_not_of(" \t\n\r", at_), text_.size()); }

  Json read(int depth) {
    if (depth > kMaxDepth) fail("fewer nested values");
    skip_space();
    Json value;
    if (peek() == '{') {
      read_object(value, depth);
    } else if (peek() == '[') {
      read_array(value, depth);
    } else if (peek() == '"') {
      value.type = Json::Type::kString;
      value.text = read_string();
    } else if (accept("true") || accept("false")) {
      value.type = Json::Type::kBool;
      value.boolean = text_[at_ - 2] == 'u';
    } else if (!accept("null")) {
      read_number(value);
    }
    return value;
  }

  void read_object(Json& value, int depth) {
    value.type = Json::Type::kObject;
    expect("{", "{");
    skip_space();
    if (accept("}")) return;
    std::set<std::string> names;  // a search of the members for each would take minutes for a hostile file
    do {
      skip_space();
      if (peek() != '"') fail("a name in quotes");
      std::string name = read_string();
      if (!names.insert(name).second) fail("a name that is new in its object");
      skip_space();
      expect(":", ":");
      value.members.emplace_back(std::move(name), read(depth + 1));
      skip_space();
    } while (accept(","));
    expect("}", ", or }");
  }

  void read_array(Json& value, int depth) {
    value.type = Json::Type::kArray;
    expect("[", "[");
    skip_space();
    if (accept("]")) return;
    do {
      value.items.push_back(read(depth + 1));
      skip_space();
    } while (accept(","));
    expect("]", ", or ]");
  }

  void read_digits() {
    if (peek() < '0' || peek() > '9') fail("a value");
    while (peek() >= '0' && peek() <= '9') ++at_;
  }

  void read_number(Json& value) {
    const std::size_t start = at_;
    accept("-");
    if (!accept("0")) read_digits();
    const std::size_t integer = at_;
    if (accept(".")) read_digits();
    if (accept("e") || accept("E")) {
      if (!accept("+")) accept("-");
      read_digits();
    }
    value.type = at_ == integer ? Json::Type::kInteger : Json::Type::kNumber;
    value.number = std::strtod(std::string(text_.substr(start, at_ - start)).c_str(), nullptr);
  }

  uint32_t read_code_unit() {
    uint32_t unit = 0;
    for (int i = 0; i < 4; ++i, ++at_) {
      const std::size_t digit = std::string_view("0123456789abcdef").find(static_cast<char>(peek() | 0x20));
      if (digit == std::string_view::npos) fail("four hexadecimal digits");
      unit = unit << 4 | static_cast<uint32_t>(digit);
    }
    return unit;
  }

  void append_utf8(std::string& to, uint32_t point) const {
    const auto low = [&](int shift) { return static_cast<char>(0x80 | (point >> shift & 0x3f)); };
    if (point < 0x80) {
      to += static_cast<char>(point);
    } else if (point < 0x800) {
      to += {static_cast<char>(0xc0 | point >> 6), low(0)};
    } else if (point < 0x10000) {
      to += {static_cast<char>(0xe0 | point >> 12), low(6), low(0)};
    } else {
      to += {static_cast<char>(0xf0 | point >> 18), low(12), low(6), low(0)};
    }
  }

  void read_escape(std::string& to) {
    static constexpr std::string_view kNames = "\"\\/bfnrt", kMeant = "\"\\/\b\f\n\r\t";
    if (!accept("u")) {
      const std::size_t at = kNames.find(peek());
      if (at_ == text_.size() || at == std::string_view::npos) fail("an escape");
      to += kMeant[at];
      ++at_;
      return;
    }
    uint32_t point = read_code_unit();
    if (point >= 0xd800 && point < 0xdc00) {
      expect("\\u", "the second half of a surrogate pair");
      const uint32_t second = read_code_unit();
      if (second < 0xdc00 || second >= 0xe000) fail("the second half of a surrogate pair");
      point = 0x10000 + ((point - 0xd800) << 10 | (second - 0xdc00));
    } else if (point >= 0xdc00 && point < 0xe000) {
      fail("the first half of a surrogate pair");
    }
    append_utf8(to, point);
  }

  std::string read_string() {
    expect("\"", "a string");
    std::string text;
    while (!accept("\"")) {
      if (at_ == text_.size() || static_cast<unsigned char>(peek()) < 0x20) fail("\" at the end of a string");
      if (accept("\\")) {
        read_escape(text);
      } else {
        text += text_[at_++];
      }
    }
    return text;
  }

  std::string_view text_;
  std::size_t at_ = 0;
};

}  // namespace

const Json* Json::find(std::string_view name) const {
  for (const auto& [key, value] : members) {
    if (key == name) return &value;
  }
  return nullptr;
}

Json parse_json(std::string_view text) { return Parser(text).document(); }

}  // namespace zigzag
