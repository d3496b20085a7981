// What a decoder layer keeps of its keys and values: the vocabulary that the solver, the plan and the scheduler share.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "core/error.h"
#include "core/shown.h"

namespace zigzag {

enum class LayerKind : int8_t {
  kRetrieval,  // every token, for ever: a full cache
  kStreaming,  // the first `sink` and the last `window` tokens: a ring
  kNative,     // the last `window` tokens, by the model itself: a ring of sink 0 that loses nothing
  kState,      // no keys: the model's own recurrent or convolution layer, or one that keeps nothing
};

inline constexpr LayerKind kLayerKinds[] = {LayerKind::kRetrieval, LayerKind::kStreaming, LayerKind::kNative,
                                            LayerKind::kState};

constexpr bool is_ring(LayerKind kind) { return kind == LayerKind::kStreaming || kind == LayerKind::kNative; }

constexpr const char* name(LayerKind kind) {
  switch (kind) {
    case LayerKind::kRetrieval: return "retrieval";
    case LayerKind::kStreaming: return "streaming";
    case LayerKind::kNative: return "native";
    case LayerKind::kState: return "state";
  }
  return "unknown";
}

// The kind of that name; throws on any other one, with `what` ("layer 3 has the") in front.
inline LayerKind parse_layer_kind(const std::string& given, const std::string& what) {
  for (const LayerKind kind : kLayerKinds) {
    if (given == name(kind)) return kind;
  }
  throw Error(concat(what, " kind \"", shown(given), "\"; supported: ", name(LayerKind::kRetrieval), ", ",
                     name(LayerKind::kStreaming), ", ", name(LayerKind::kNative), ", ", name(LayerKind::kState)));
}

// What the KV heads of one layer keep: one kind for all of them, or a kind for each. A layer with heads of both kinds
// is a mixed one.
struct HeadKinds {
  std::vector<LayerKind> kinds;  // one, or one per KV head

  HeadKinds(LayerKind kind) : kinds{kind} {}  // NOLINT: a layer of one kind is written as that kind
  explicit HeadKinds(std::vector<LayerKind> heads) : kinds(std::move(heads)) {}

  bool mixed() const { return std::adjacent_find(kinds.begin(), kinds.end(), std::not_equal_to<>()) != kinds.end(); }
};

// A layer per list of names, which holds one name or one per KV head. Throws on no name and on an unknown one, naming
// the layer.
inline std::vector<HeadKinds> parse_head_kinds(const std::vector<std::vector<std::string>>& names) {
  std::vector<HeadKinds> layers;
  layers.reserve(names.size());
  for (const std::vector<std::string>& heads : names) {
    const std::string layer = concat("layer ", layers.size());
    ZZ_CHECK(!heads.empty(), layer, " has no KV heads");
    std::vector<LayerKind> kinds;
    for (const std::string& given : heads) {
      kinds.push_back(parse_layer_kind(given, layer + (heads.size() == 1 ? " has the" : " has a KV head of the")));
    }
    layers.emplace_back(std::move(kinds));
  }
  return layers;
}

}  // namespace zigzag
