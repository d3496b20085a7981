// Command line of a benchmark: every option takes one value or a comma-separated list (an axis).
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace zigzag::bench {

struct Option {
  std::string name;   // without the leading dashes
  std::string value;  // default; an empty one shows as "none"
  std::string help;
};

class Arguments {
 public:
  Arguments(std::string summary, std::vector<Option> options);

  // Reads "--name value" and "--name=value". Returns false after printing the help for --help.
  // Throws zigzag::Error on an unknown option or a missing value.
  bool parse(int argc, const char* const* argv);

  const std::string& text(const std::string& name) const;
  int integer(const std::string& name) const;
  std::vector<int> integers(const std::string& name) const;
  std::vector<std::string> list(const std::string& name) const;

 private:
  void print_help() const;

  std::string summary_;
  std::vector<Option> options_;
  std::map<std::string, std::string> values_;
};

std::vector<std::string> split(const std::string& text, char separator);

// A positive or zero count, with an optional suffix K (1024) or M (1024 * 1024). `what` names it in the error.
int parse_count(const std::string& text, const std::string& what);

}  // namespace zigzag::bench
