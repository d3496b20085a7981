// The reader of plan files: what Plan.save writes, what a hand may write, and an error for everything else.
#include <doctest/doctest.h>

#include <algorithm>
#include <random>
#include <string>

#include "core/error.h"
#include "core/shown.h"
#include "engine/json.h"
#include "engine/plan_file.h"
#include "engine/scheduler.h"
#include "error_text.h"

namespace {

using namespace zigzag;
using zigzag::testing::error_of;

constexpr LayerKind R = LayerKind::kRetrieval;
constexpr LayerKind S = LayerKind::kStreaming;

std::string plan_with(const std::string& fields) {
  return "{\"format\": \"zigzag-plan\", \"version\": 4, \"sink\": 4, \"window\": 8, " + fields + "}";
}

const std::string kKinds = "\"kinds\": [\"retrieval\", [\"streaming\", \"retrieval\"], \"streaming\"]";

}  // namespace

TEST_CASE("plan file: kinds, sizes, formats and smoothing") {
  const PlanFile file = parse_plan(
      plan_with(kKinds + ", \"kv_format\": {\"k\": \"int8\", \"v\": \"int4\"}, \"ring_kv_format\": \"fp8/none\", "
                         "\"key_smoothing\": true, \"provenance\": {\"text\": \"\\u00e9 \\ud83d\\ude00 \\n\", "
                         "\"list\": [1, -2.5e-3, null]}"));
  CHECK(file.plan.num_layers() == 3);
  CHECK(file.plan.layers()[0].kinds == std::vector<LayerKind>{R});
  CHECK(file.plan.layers()[1].kinds == std::vector<LayerKind>{S, R});
  CHECK(file.plan.num_kv_heads() == 2);
  CHECK(file.plan.sink() == 4);
  CHECK(file.plan.window() == 8);
  CHECK(file.retrieval.k == KvFormat::kInt8);
  CHECK(file.retrieval.v == KvFormat::kInt4);
  CHECK(file.streaming.k == KvFormat::kFp8);
  CHECK(file.streaming.v == KvFormat::kPlain);
  CHECK(file.key_smoothing);
  const PlanFile plain = parse_plan(plan_with(kKinds + ", \"kv_format\": null"));
  CHECK(plain.retrieval.k == KvFormat::kPlain);
  CHECK(!plain.key_smoothing);
}

TEST_CASE("plan file: a byte-order mark is no content, and many names take no time") {
  CHECK(parse_plan("\xef\xbb\xbf" + plan_with(kKinds)).plan.sink() == 4);
  std::string names = "\"provenance\": {\"x\": 0";
  for (int i = 0; i < 200000; ++i) names += ", \"" + std::to_string(i) + "\": 0";
  CHECK(parse_plan(plan_with(kKinds + ", " + names + "}")).plan.num_layers() == 3);
}

TEST_CASE("plan file: native layers and sizes of layers") {
  const std::string kinds = "\"kinds\": [\"native\", \"retrieval\", \"streaming\", \"streaming\"], ";
  const LayerPlan plan = parse_plan(plan_with(kinds + "\"layer_sizes\": [[0, 16], null, null, [2, 5]]")).plan;
  CHECK(plan.layers()[0].kinds == std::vector<LayerKind>{LayerKind::kNative});
  CHECK(plan.size(0).window == 16);
  CHECK(plan.size(2).sink == 4);
  CHECK(plan.size(3).window == 5);
  const Scheduler scheduler(plan, {4, 2, 64, DType::kBFloat16}, 3);
  CHECK(scheduler.caches(0)[0].slots(1000) == 19);
  CHECK(scheduler.caches(3)[0].slots(1000) == 10);
  CHECK(scheduler.kv_bytes(1, 1000).native == 19 * 2 * 2 * 64 * 2);
  const auto error = [&](const std::string& sizes) { return error_of([&] { parse_plan(plan_with(kinds + sizes)); }); };
  CHECK(error("\"provenance\": {}").find("layer 0 is native and needs a size") != std::string::npos);
  CHECK(error("\"layer_sizes\": 3").find("layer_sizes must be a list") != std::string::npos);
  CHECK(error("\"layer_sizes\": [[0, 16]]").find("layer_sizes has 1 entries, the plan has 4") != std::string::npos);
  CHECK(error("\"layer_sizes\": [[0, 16, 1], null, null, null]").find("null or [sink, window]") != std::string::npos);
  CHECK(error("\"layer_sizes\": [[1, 16], null, null, null]").find("its sink must be 0, got 1") != std::string::npos);
  CHECK(error("\"layer_sizes\": [[0, 16], [0, 1], null, null]").find("layer 1 retrieves") != std::string::npos);
  CHECK(error("\"layer_sizes\": [[0, 0.5], null, null, null]").find("must be an integer") != std::string::npos);
}

TEST_CASE("plan file: layers without keys have no caches") {
  const std::string kinds = "\"kinds\": [\"state\", \"retrieval\", \"state\", \"streaming\"]";
  const LayerPlan plan = parse_plan(plan_with(kinds)).plan;
  CHECK(plan.layers()[0].kinds == std::vector<LayerKind>{LayerKind::kState});
  const Scheduler scheduler(plan, {4, 2, 64, DType::kBFloat16});
  CHECK(scheduler.caches(0).empty());
  CHECK(scheduler.launches_per_step() == 2);
  const int64_t token = 2 * 2 * 64 * 2;
  CHECK(scheduler.kv_bytes(1, 1000).retrieval == 1000 * token);
  CHECK(scheduler.kv_bytes(1, 1000).streaming == 12 * token);
  CHECK(scheduler.kv_bytes(1, 1000).of(LayerKind::kState) == 0);
  CHECK(scheduler.all_retrieval_kv_bytes(1, 1000) == 2 * 1000 * token);
  const auto error = [&](const std::string& given) { return error_of([&] { parse_plan(plan_with(given)); }); };
  CHECK(error(kinds + ", \"layer_sizes\": [[0, 4], null, null, null]").find("layer 0 keeps no keys") !=
        std::string::npos);
  CHECK(error("\"kinds\": [[\"state\", \"retrieval\"]]").find("mixes state heads") != std::string::npos);
}

TEST_CASE("plan file: an error says what is wrong") {
  const auto check = [](const std::string& text, const std::string& message) {
    CAPTURE(text);
    CHECK(error_of([&] { parse_plan(text); }).find(message) != std::string::npos);
  };
  check("[]", "not a JSON object with \"format\"");
  check("{\"format\": \"zigzag-plan\"}", "missing field: version");
  check("{\"format\": \"zigzag-plan\", \"version\": 7}", "version 7, from a newer zigzag_ext");
  check("{\"format\": \"zigzag-plan\", \"version\": 0}", "its version is 0; supported: 1 to 6");
  check("{\"format\": \"zigzag-plan\", \"version\": true}", "version must be an integer");
  check("{\"format\": \"zigzag-plan\", \"version\": 1}", "missing field: kinds");
  check(plan_with(kKinds + ", \"color\": 1"), "unknown field: color");
  check(plan_with("\"kinds\": \"retrieval\""), "kinds must be a list");
  check(plan_with("\"kinds\": [1]"), "kinds must be strings");
  check(plan_with("\"kinds\": [\"full\"]"), "layer 0 has the kind \"full\"");
  check(plan_with("\"kinds\": []"), "at least one layer");
  check(plan_with(kKinds + ", \"kv_format\": \"int2\""), "KV format \"int2\" is not supported");
  check(plan_with(kKinds + ", \"kv_format\": {\"k\": \"int8\"}"), "kv_format must be a format");
  check(plan_with(kKinds + ", \"key_smoothing\": 1"), "key_smoothing must be true or false");
  check(plan_with(kKinds + ", \"key_smoothing\": true"), "key_smoothing needs quantised keys");
  check("{\"format\": \"zigzag-plan\", \"version\": 1, \"kinds\": [\"retrieval\"], \"sink\": 4.0, \"window\": 8}",
        "sink must be an integer");
  CHECK(error_of([] { read_plan_file("no/such/plan.json"); }) == "there is no plan file at no/such/plan.json");
  CHECK(error_of([] { read_plan_file("/dev/zero"); }) ==
        "/dev/zero is not a plan file: it has more than 4 MiB, the most that is read");
}

TEST_CASE("plan file: errors show what a file says in one short line of ASCII") {
  const std::string hostile = "\\u001b[2J\\n\xc2\x9b" + std::string(5000, 'x') + "\\u202e\\u007f";
  const std::string quoted = "\"" + hostile + "\"";
  for (const std::string& fields :
       {kKinds + ", " + quoted + ": 1", "\"kinds\": [" + quoted + "]", "\"kinds\": [[" + quoted + "]]",
        kKinds + ", \"kv_format\": " + quoted, kKinds + ", \"kv_format\": \"int8/" + hostile + "\"",
        kKinds + ", \"ring_kv_format\": {\"k\": " + quoted + ", \"v\": \"int8\"}"}) {
    const std::string error = error_of([&] { parse_plan(plan_with(fields)); });
    CAPTURE(error);
    CHECK(error.size() < 400);
    CHECK(error.find("\\x1b[2J\\x0a\\xc2\\x9b") != std::string::npos);
    CHECK(error.find("xxx...xxx") != std::string::npos);
    CHECK(std::all_of(error.begin(), error.end(), [](char c) { return c >= 0x20 && c < 0x7f; }));
  }
  const std::string good = plan_with(kKinds + ", \"kv_format\": \"int8\", \"layer_sizes\": [null, null, [2, 5]]");
  std::mt19937 random(1);
  for (int round = 0; round < 20000; ++round) {  // any bytes at any places
    std::string text = good;
    for (unsigned i = 0; i <= random() % 4; ++i) text[random() % text.size()] = static_cast<char>(random() % 256);
    const std::string error = error_of([&] { parse_plan(text); });
    CHECK(error.size() < 400);
    CHECK(std::all_of(error.begin(), error.end(), [](char c) { return c >= 0x20 && c < 0x7f; }));
  }
  CHECK(shown("int2") == "int2");
  CHECK(shown(std::string(80, 'a')) == std::string(80, 'a'));
  CHECK(shown(std::string(81, 'a')) == std::string(40, 'a') + "..." + std::string(40, 'a') + " (81 bytes)");
}

TEST_CASE("JSON: the standard and nothing beside it") {
  CHECK(parse_json(" [0, -0, 10, 1.5, 2e+3, 1E-2] ").items[4].number == 2000);
  CHECK(parse_json("0").type == Json::Type::kInteger);
  CHECK(parse_json("1.0").type == Json::Type::kNumber);
  CHECK(parse_json("\"\\u20ac\\ud83d\\ude00\\t\"").text == "\xe2\x82\xac\xf0\x9f\x98\x80\t");
  CHECK(parse_json("{\"a\": {\"b\": false}}").find("a")->find("b")->type == Json::Type::kBool);
  CHECK(!parse_json("[true, false]").items[1].boolean);
  CHECK(parse_json("[true, false]").items[0].boolean);
  for (const char* text : {"",
                           " ",
                           "nul",
                           "[1,]",
                           "[1 2]",
                           "{\"a\" 1}",
                           "{a: 1}",
                           "{\"a\": 1,}",
                           "01",
                           "1.",
                           ".5",
                           "+1",
                           "1e",
                           "-",
                           "NaN",
                           "Infinity",
                           "'a'",
                           "\"a",
                           "\"\\x\"",
                           "\"\\u12g4\"",
                           "\"\\ud800\"",
                           "\"\\ude00\"",
                           "\"a\nb\"",
                           "[1] 2",
                           "{\"a\": 1, \"a\": 2}",
                           "// no",
                           "\"\\"}) {
    CAPTURE(text);
    CHECK(error_of([&] { parse_json(text); }).find("it is not JSON: expected ") == 0);
  }
  const std::string deep(64, '['), deeper(66, '[');
  CHECK_NOTHROW(parse_json(deep + std::string(64, ']')));
  CHECK(error_of([&] { parse_json(deeper); }).find("fewer nested values") != std::string::npos);
  CHECK(error_of([] { parse_json("[1, x]"); }) == "it is not JSON: expected a value at byte 4");
}
