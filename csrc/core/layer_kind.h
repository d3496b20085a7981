// What a decoder layer keeps of its keys and values: the vocabulary that the solver, the plan and the scheduler share.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/error.h"

namespace zigzag {

enum class LayerKind : int8_t {
  kRetrieval,  // every token, for ever: a full cache
  kStreaming,  // the first `sink` and the last `window` tokens: a ring
};

constexpr const char* name(LayerKind kind) {
  switch (kind) {
    case LayerKind::kRetrieval: return "retrieval";
    case LayerKind::kStreaming: return "streaming";
  }
  return "unknown";
}

// The kinds of all layers from their names; throws on the first unknown name, naming the layer.
inline std::vector<LayerKind> parse_layer_kinds(const std::vector<std::string>& names) {
  std::vector<LayerKind> kinds;
  kinds.reserve(names.size());
  for (const std::string& given : names) {
    const bool retrieval = given == name(LayerKind::kRetrieval);
    ZZ_CHECK(retrieval || given == name(LayerKind::kStreaming), "layer ", kinds.size(), " has the kind \"", given,
             "\"; supported: ", name(LayerKind::kRetrieval), ", ", name(LayerKind::kStreaming));
    kinds.push_back(retrieval ? LayerKind::kRetrieval : LayerKind::kStreaming);
  }
  return kinds;
}

}  // namespace zigzag
