#include "engine/plan_file.h"

#include <cmath>
#include <cstdio>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "core/error.h"
#include "core/shown.h"
#include "engine/json.h"

namespace zigzag {
namespace {

using Type = Json::Type;

constexpr int kVersion = 6;                 // the newest that zigzag_ext/planning/plan.py writes
constexpr std::size_t kMaxBytes = 4 << 20;  // as in zigzag_ext/planning/reading.py
constexpr std::string_view kByteOrderMark = "\xef\xbb\xbf";
constexpr std::string_view kRequired[] = {"format", "version", "kinds", "sink", "window"};
constexpr std::string_view kOptional[] = {"layer_sizes", "kv_format", "ring_kv_format", "key_smoothing", "provenance"};

template <class Names>
bool contains(const Names& names, std::string_view name) {
  for (const std::string_view known : names) {
    if (known == name) return true;
  }
  return false;
}

int64_t as_integer(const Json& value, std::string_view name) {
  ZZ_CHECK(value.type == Type::kInteger && std::abs(value.number) < 0x1p53, name, " must be an integer below 2^53");
  return static_cast<int64_t>(value.number);
}

int64_t integer(const Json& file, std::string_view name) { return as_integer(*file.find(name), name); }

void check_header(const Json& file) {
  const Json* format = file.find("format");
  ZZ_CHECK(format != nullptr && format->text == "zigzag-plan",
           "it is not a JSON object with \"format\": \"zigzag-plan\"");
  ZZ_CHECK(file.find("version") != nullptr, "missing field: version");
  const int64_t version = integer(file, "version");
  ZZ_CHECK(version >= 1, "its version is ", version, "; supported: 1 to ", kVersion);
  ZZ_CHECK(version <= kVersion, "it has version ", version,
           ", from a newer zigzag_ext; this one supports versions up to ", kVersion);
  for (const std::string_view name : kRequired) ZZ_CHECK(file.find(name) != nullptr, "missing field: ", name);
  for (const auto& member : file.members) {
    ZZ_CHECK(contains(kRequired, member.first) || contains(kOptional, member.first),
             "unknown field: ", shown(member.first));
  }
}

std::string string_of(const Json& value, std::string_view what) {
  ZZ_CHECK(value.type == Type::kString, what, " must be strings");
  return value.text;
}

std::vector<HeadKinds> kinds_of(const Json& kinds) {
  ZZ_CHECK(kinds.type == Type::kArray, "kinds must be a list, one kind or list of kinds per layer");
  std::vector<std::vector<std::string>> names;
  for (const Json& layer : kinds.items) {
    std::vector<std::string>& heads = names.emplace_back();
    if (layer.type != Type::kArray) {
      heads.push_back(string_of(layer, "kinds"));
    } else {
      for (const Json& head : layer.items) heads.push_back(string_of(head, "kinds"));
    }
  }
  return parse_head_kinds(names);
}

// A list of null or [sink, window] per layer, or nothing.
std::vector<std::optional<RingSize>> sizes_of(const Json* sizes) {
  std::vector<std::optional<RingSize>> all;
  if (sizes == nullptr) return all;
  ZZ_CHECK(sizes->type == Type::kArray, "layer_sizes must be a list, null or [sink, window] per layer");
  for (const Json& size : sizes->items) {
    all.emplace_back();
    if (size.type == Type::kNull) continue;
    ZZ_CHECK(size.type == Type::kArray && size.items.size() == 2, "layer_sizes must hold null or [sink, window]");
    all.back() = RingSize{as_integer(size.items[0], "layer_sizes"), as_integer(size.items[1], "layer_sizes")};
  }
  return all;
}

// null, "int8", "int8/int4" or {"k": "int8", "v": "int4"}.
KvFormats formats_of(const Json* value, std::string_view name) {
  if (value == nullptr || value->type == Type::kNull) return {};
  if (value->type == Type::kString) {
    const std::size_t slash = value->text.find('/');
    const std::string k = value->text.substr(0, slash);
    return {parse_kv_format(k), parse_kv_format(slash == std::string::npos ? k : value->text.substr(slash + 1))};
  }
  const Json *k = value->find("k"), *v = value->find("v");
  ZZ_CHECK(k != nullptr && v != nullptr && value->members.size() == 2, name,
           " must be a format, two of them as \"keys/values\", or {\"k\": format, \"v\": format}");
  return {parse_kv_format(string_of(*k, name)), parse_kv_format(string_of(*v, name))};
}

std::string contents(const std::string& path) {
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "rb"), &std::fclose);
  ZZ_CHECK(file != nullptr, "there is no plan file at ", path);
  std::string text;
  char block[4096];
  for (std::size_t got = 0; (got = std::fread(block, 1, sizeof(block), file.get())) > 0;) {
    text.append(block, got);
    ZZ_CHECK(text.size() <= kMaxBytes, path, " is not a plan file: it has more than 4 MiB, the most that is read");
  }
  ZZ_CHECK(std::ferror(file.get()) == 0, path, " could not be read");
  return text;
}

}  // namespace

PlanFile parse_plan(std::string_view text) {
  const bool marked = text.substr(0, kByteOrderMark.size()) == kByteOrderMark;
  const Json file = parse_json(text.substr(marked ? kByteOrderMark.size() : 0));
  check_header(file);
  const KvFormats retrieval = formats_of(file.find("kv_format"), "kv_format");
  const KvFormats streaming = formats_of(file.find("ring_kv_format"), "ring_kv_format");
  const Json* smoothing = file.find("key_smoothing");
  ZZ_CHECK(smoothing == nullptr || smoothing->type == Type::kBool, "key_smoothing must be true or false");
  const bool smooth = smoothing != nullptr && smoothing->boolean;
  ZZ_CHECK(!smooth || retrieval.k != KvFormat::kPlain || streaming.k != KvFormat::kPlain,
           "key_smoothing needs quantised keys: kv_format or ring_kv_format must name a format for them");
  return {LayerPlan(kinds_of(*file.find("kinds")), integer(file, "sink"), integer(file, "window"),
                    sizes_of(file.find("layer_sizes"))),
          retrieval, streaming, smooth};
}

PlanFile read_plan_file(const std::string& path) {
  const std::string text = contents(path);
  try {
    return parse_plan(text);
  } catch (const Error& error) {
    throw Error(concat(path, " is not a usable plan file: ", error.what()));
  }
}

}  // namespace zigzag
