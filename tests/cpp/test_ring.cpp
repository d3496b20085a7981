// Slot arithmetic against a simulated cache: write positions one by one, then ask what each slot holds.
#include <algorithm>
#include <vector>

#include "doctest/doctest.h"
#include "kv/key_runs.h"
#include "kv/ring.h"

using zigzag::KeyInterval;
using zigzag::KeyRun;
using zigzag::KeyRuns;
using zigzag::RingLayout;

// The pictures in kv/ring.h.
constexpr RingLayout kPicture{2, 4, 6};
static_assert(kPicture.slot(1) == 1 && kPicture.slot(5) == 5 && kPicture.slot(6) == 2 && kPicture.slot(8) == 4);
static_assert(kPicture.position(2, 9) == 6 && kPicture.position(5, 9) == 5 && kPicture.position(1, 9) == 1);
static_assert(kPicture.position(3, 3) == -1 && kPicture.used_slots(3) == 3 && kPicture.used_slots(9) == 6);
static_assert(kPicture.visible(1, 100) && !kPicture.visible(96, 100) && kPicture.visible(97, 100) &&
              !kPicture.visible(101, 100));
static_assert(kPicture.survives(1, 100) && !kPicture.survives(95, 100) && kPicture.survives(96, 100));
static_assert(RingLayout{7, 0, 9}.is_full() && RingLayout{7, 0, 9}.slot(123) == 123 &&
              RingLayout{7, 0, 9}.visible(0, 123));
constexpr RingLayout kSlack{2, 3, 7};
static_assert(kSlack.span() == 5 && RingLayout{2, 3, 0}.span() == 3);
static_assert(kSlack.slot(6) == 6 && kSlack.slot(7) == 2 && kSlack.slot(8) == 3);
static_assert(kSlack.position(2, 9) == 7 && kSlack.position(6, 9) == 6 && kSlack.position(5, 9) == -1);
static_assert(kSlack.survives(4, 9) && !kSlack.survives(3, 9) && kSlack.used_slots(6) == 6);

namespace {

constexpr int kMaxLength = 30;

// Position held by each slot after `length` single appends, -1 where nothing was written.
std::vector<int> simulate(const RingLayout& layout, int length) {
  std::vector<int> held(layout.slots, -1);
  int next = layout.sink;  // ring slot to overwrite next
  for (int position = 0; position < length; ++position) {
    if (layout.is_full() || position < layout.sink) {
      held[position] = position;
    } else {
      held[next] = position;
      next = next + 1 == layout.slots ? layout.sink : next + 1;
    }
  }
  return held;
}

template <class F>
void for_layouts(F&& f) {
  for (int sink = 0; sink <= 3; ++sink) {
    for (int window = 0; window <= 5; ++window) {
      for (const int slack : {0, 1, 2, 5, kMaxLength}) {
        const RingLayout layout{sink, window, window == 0 ? kMaxLength : sink + window + slack};
        for (int length = 0; length <= kMaxLength; ++length) f(layout, length);
        if (window == 0) break;
      }
    }
  }
}

}  // namespace

TEST_CASE("ring: slot, position and used_slots agree with a simulated cache") {
  for_layouts([](RingLayout layout, int length) {
    CAPTURE(layout.sink);
    CAPTURE(layout.window);
    CAPTURE(layout.slots);
    CAPTURE(length);
    const std::vector<int> held = simulate(layout, length);
    int used = 0;
    for (int slot = 0; slot < static_cast<int>(held.size()); ++slot) {
      const bool kept = layout.is_full() || held[slot] < layout.sink || held[slot] >= length - layout.window;
      REQUIRE(layout.position(slot, length) == (kept ? held[slot] : -1));
      if (held[slot] < 0) continue;
      REQUIRE(layout.slot(held[slot]) == slot);
      ++used;
    }
    REQUIRE(layout.used_slots(length) == used);
  });
}

TEST_CASE("ring: what survives an append is what the simulated cache still holds") {
  for_layouts([](RingLayout layout, int length) {
    const std::vector<int> held = simulate(layout, length);
    for (int position = 0; position < length; ++position) {
      const bool kept = std::find(held.begin(), held.end(), position) != held.end();
      REQUIRE(layout.survives(position, length) == kept);
    }
  });
}

TEST_CASE("ring: every key that the next token sees is in the cache, and sink + window keys at most") {
  for_layouts([](RingLayout layout, int length) {
    int seen = 0;
    for (int key = 0; key <= length; ++key) {
      const bool expected = layout.window == 0 || key < layout.sink || key > length - layout.window;
      REQUIRE(layout.visible(key, length) == expected);
      if (expected && key < length) REQUIRE(layout.survives(key, length));
      seen += expected;
    }
    if (layout.window > 0) REQUIRE(seen == std::min(length + 1, layout.sink + layout.window));
    REQUIRE_FALSE(layout.visible(length + 1, length));
    REQUIRE_FALSE(layout.visible(-1, length));
  });
}

TEST_CASE(
    "ring: with slack k - 1, k tokens written and taken back leave what later queries see, and one more does not") {
  for_layouts([](RingLayout layout, int length) {
    if (layout.is_full()) return;
    const int slack = layout.span() - layout.window;
    for (int drafts = 0; drafts <= slack + 2; ++drafts) {
      std::vector<int> held = simulate(layout, length + drafts);
      bool intact = true;
      for (int key = 0; key < length; ++key)
        intact = intact && (!layout.visible(key, length) || held[layout.slot(key)] == key);
      if (drafts <= slack + 1) REQUIRE(intact);
      if (drafts > slack + 1 && layout.window > 1 && length >= layout.sink + layout.window) REQUIRE_FALSE(intact);
    }
  });
}

TEST_CASE("key runs: each query of a block sees exactly its visible keys, once, at the rows that hold them") {
  constexpr int kPad = 2;
  for_layouts([](RingLayout layout, int length) {
    for (bool cached : {false, true}) {
      const std::vector<int> held = cached ? simulate(layout, length) : std::vector<int>{};
      const int slots = static_cast<int>(held.size());
      for (int first = length; first < length + 8; first += 3) {
        const int last = first + 2;
        const KeyRuns keys = zigzag::visible_runs(layout, slots, length, kPad, first, last);
        for (int query = first; query <= last; ++query) {
          std::vector<int> seen(query + 1, 0);
          for (int i = 0; i < keys.num_runs; ++i) {
            const KeyRun& run = keys.runs[i];
            const KeyInterval interval = zigzag::visible_interval(layout, run, 1, run.count - 1, query);
            const KeyInterval whole = zigzag::visible_interval(layout, run, 0, run.count, query);
            REQUIRE(interval.end == std::max(whole.end - 1, 0));
            REQUIRE(interval.begin == std::min(std::max(whole.begin - 1, 0), interval.end));
            for (int k = whole.begin; k < whole.end; ++k) {
              const int position = run.position + k, row = run.row + k;
              REQUIRE(position <= query);
              ++seen[position];
              if (run.cached) {
                REQUIRE(held[row] == position);
              } else {
                REQUIRE(row == kPad + position - length);
              }
            }
          }
          for (int position = 0; position <= query; ++position) {
            const bool available = position >= length || cached;
            REQUIRE(seen[position] == (available && layout.visible(position, query) ? 1 : 0));
          }
        }
      }
    }
  });
}
