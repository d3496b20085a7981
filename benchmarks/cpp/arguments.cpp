#include "arguments.h"

#include <cstdio>
#include <limits>
#include <utility>

#include "core/error.h"

namespace zigzag::bench {

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  for (std::size_t begin = 0; begin <= text.size();) {
    const std::size_t end = std::min(text.find(separator, begin), text.size());
    if (end > begin) parts.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

int parse_count(const std::string& text, const std::string& what) {
  std::size_t used = 0;
  long long value = -1;
  try {
    value = std::stoll(text, &used);
  } catch (const std::exception&) {
    used = text.size() + 1;
  }
  if (used + 1 == text.size() && (text[used] == 'K' || text[used] == 'k')) value <<= 10, ++used;
  if (used + 1 == text.size() && (text[used] == 'M' || text[used] == 'm')) value <<= 20, ++used;
  ZZ_CHECK(used == text.size() && value >= 0 && value <= std::numeric_limits<int>::max(), what,
           " takes whole numbers such as 4096 or 4K; got '", text, "'");
  return static_cast<int>(value);
}

Arguments::Arguments(std::string summary, std::vector<Option> options)
    : summary_(std::move(summary)), options_(std::move(options)) {
  for (const Option& option : options_) values_[option.name] = option.value;
}

bool Arguments::parse(int argc, const char* const* argv) {
  for (int i = 1; i < argc; ++i) {
    std::string word = argv[i];
    if (word == "--help" || word == "-h") {
      print_help();
      return false;
    }
    ZZ_CHECK(word.rfind("--", 0) == 0, "options start with --; got '", word, "'. See --help");
    word.erase(0, 2);
    const std::size_t equals = word.find('=');
    const std::string name = word.substr(0, equals);
    ZZ_CHECK(values_.count(name), "unknown option --", name, ". See --help");
    if (equals != std::string::npos) {
      values_[name] = word.substr(equals + 1);
    } else {
      ZZ_CHECK(i + 1 < argc, "option --", name, " needs a value");
      values_[name] = argv[++i];
    }
  }
  return true;
}

const std::string& Arguments::text(const std::string& name) const { return values_.at(name); }

int Arguments::integer(const std::string& name) const { return parse_count(text(name), "--" + name); }

std::vector<std::string> Arguments::list(const std::string& name) const {
  std::vector<std::string> items = split(text(name), ',');
  ZZ_CHECK(!items.empty(), "option --", name, " needs at least one value");
  return items;
}

std::vector<int> Arguments::integers(const std::string& name) const {
  std::vector<int> values;
  for (const std::string& item : list(name)) values.push_back(parse_count(item, "--" + name));
  return values;
}

void Arguments::print_help() const {
  std::printf("%s\n\nOptions (a list is separated by commas; every combination is one cell):\n", summary_.c_str());
  for (const Option& option : options_) {
    const std::string shown = option.value.empty() ? "none" : option.value;
    std::printf("  --%-14s %s [%s]\n", option.name.c_str(), option.help.c_str(), shown.c_str());
  }
}

}  // namespace zigzag::bench
