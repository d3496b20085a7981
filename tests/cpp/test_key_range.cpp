// The key numbering of the prefill kernel against the visibility rule, exhaustively over small shapes. Needs no GPU.
#include <doctest/doctest.h>

#include <initializer_list>

#include "kv/key_range.h"

namespace zigzag {

TEST_CASE("key range lists every key that some query sees, once, and no other") {
  for (const RingLayout layout :
       {RingLayout{0, 0, 0}, RingLayout{0, 1, 0}, RingLayout{3, 1, 0}, RingLayout{4, 6, 0}, RingLayout{9, 20, 0}}) {
    for (int first = 0; first <= 30; ++first) {
      for (int query = first; query < first + 14; ++query) {
        for (int last = query; last < query + 9; ++last) {
          for (const int oldest : {0, first}) {
            const KeyRange keys = KeyRange::of(layout, oldest, query, last);
            int number = 0;
            for (int key = oldest; key <= last; ++key) {
              bool seen = false;
              for (int q = query; q <= last; ++q) seen = seen || layout.visible(key, q);
              if (!seen) continue;
              REQUIRE(number < keys.count);
              REQUIRE(keys.position(number++) == key);
            }
            REQUIRE(number == keys.count);
            for (int q = query; q <= last; ++q) {
              for (int i = 0; i < number + 3; ++i) {
                const bool seen = i < keys.end(q) && (i < keys.num_sink || i >= keys.window_begin(q));
                REQUIRE(seen == (i < number && layout.visible(keys.position(i), q)));
              }
            }
            for (int begin = 0; begin <= number; ++begin) {
              bool all = begin + 4 <= number;
              for (int i = begin; all && i < begin + 4; ++i) {
                for (int q = query; q <= last; ++q) all = all && layout.visible(keys.position(i), q);
              }
              REQUIRE(keys.all_visible(begin, 4) == all);
            }
          }
        }
      }
    }
  }
}

}  // namespace zigzag
