// Kinds and formats as Python names them.
#pragma once

#include <pybind11/stl.h>

#include <optional>
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

// Of each layer (sink, window), or None; empty where no layer has a size of its own.
using LayerSizes = std::vector<std::optional<std::pair<int64_t, int64_t>>>;

inline LayerPlan make_plan(const KindNames& kinds, int64_t sink, int64_t window, const LayerSizes& given) {
  std::vector<std::optional<RingSize>> sizes;
  sizes.reserve(given.size());
  for (const auto& size : given) {
    sizes.push_back(size ? std::optional(RingSize{size->first, size->second}) : std::nullopt);
  }
  return LayerPlan(parse_kinds(kinds), sink, window, std::move(sizes));
}

using FormatNames = std::pair<std::string, std::string>;  // of keys, of values

inline KvFormats parse_kv_formats(const FormatNames& names) {
  return {parse_kv_format(names.first), parse_kv_format(names.second)};
}

}  // namespace zigzag::bindings
