// Kinds and formats as Python names them.
#pragma once

#include <pybind11/stl.h>

#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "bindings/c/bindings.h"
#include "core/types.h"
#include "engine/layer_plan.h"

namespace zigzag::bindings {

// A layer is the name of its kind, or a list of names, one per KV head.
using KindNames = std::vector<std::variant<std::string, std::vector<std::string>>>;

inline std::vector<HeadKinds> parse_kinds(const KindNames& layers) {
  std::vector<std::vector<std::string>> names;
  names.reserve(layers.size());
  for (const auto& layer : layers) {
    const std::string* whole = std::get_if<std::string>(&layer);
    names.push_back(whole ? std::vector<std::string>{*whole} : std::get<std::vector<std::string>>(layer));
  }
  return parse_head_kinds(names);
}

using FormatNames = std::pair<std::string, std::string>;  // of keys, of values

inline KvFormats parse_kv_formats(const FormatNames& names) {
  return {parse_kv_format(names.first), parse_kv_format(names.second)};
}

}  // namespace zigzag::bindings
