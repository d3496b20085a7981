// Text that comes from a file or a caller, fit for a message.
#pragma once

#include <string>
#include <string_view>

namespace zigzag {

constexpr std::size_t kShown = 80;  // bytes of a text in a message, as in zigzag_ext/planning/reading.py

// `text`, shortened in the middle, with everything but printable ASCII as \xNN: it can neither move a cursor nor end a
// line, and takes less than 5 * kShown bytes.
inline std::string shown(std::string_view text) {
  std::string result;
  const auto append = [&result](std::string_view part) {
    constexpr char kDigits[] = "0123456789abcdef";
    for (const char c : part) {
      const auto byte = static_cast<unsigned char>(c);
      if (byte >= 0x20 && byte < 0x7f) {
        result += c;
      } else {
        result.append({'\\', 'x', kDigits[byte >> 4], kDigits[byte & 15]});
      }
    }
  };
  if (text.size() <= kShown) {
    append(text);
  } else {
    append(text.substr(0, kShown / 2));
    result += "...";
    append(text.substr(text.size() - kShown / 2));
    result += " (" + std::to_string(text.size()) + " bytes)";
  }
  return result;
}

}  // namespace zigzag
