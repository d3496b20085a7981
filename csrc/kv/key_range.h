// Which keys one tile of queries attends, as a dense numbering: arithmetic only, for host and device.
//
//     position   first ... sink-1   |   band_begin ... last_query       sink and band, nothing between them
//     number     0 ...              |   num_sink   ... count-1
//
// The kernel walks the numbers in blocks, so a streaming layer costs sink + window + (queries of the tile) keys
// whatever the context. A full cache is the case of no sink and a window without bound.
#pragma once

#include <climits>

#include "kv/ring.h"

namespace zigzag {

// A query sees the numbers [0, num_sink) and [window_begin, end) of its tile, of both only what lies before its end.
struct KeyRange {
  RingLayout seen;  // the visibility rule, with window INT_MAX for a full cache
  int first_query, last_query;
  int first;     // position of key 0
  int num_sink;  // keys before the band
  int gap;       // position - number inside the band
  int count;     // keys in all

  // Keys that some query at a position in [first_query, last_query] sees; nothing before position `first` exists.
  static ZZ_HOST_DEVICE constexpr KeyRange of(RingLayout layout, int first, int first_query, int last_query) {
    KeyRange keys = {};
    keys.seen = layout.is_full() ? RingLayout{0, INT_MAX, 0} : layout;
    keys.first_query = first_query;
    keys.last_query = last_query;
    keys.first = first;
    const int sink_end = larger(first, smaller(keys.seen.sink, last_query + 1));
    const int band_begin = larger(sink_end, first_query - keys.seen.window + 1);
    keys.num_sink = sink_end - first;
    keys.gap = band_begin - keys.num_sink;
    keys.count = keys.num_sink + last_query + 1 - band_begin;
    return keys;
  }

  ZZ_HOST_DEVICE constexpr int position(int number) const { return number + (number < num_sink ? first : gap); }

  // Of the keys that are no sinks, the first number that the query sees: at least num_sink.
  ZZ_HOST_DEVICE constexpr int window_begin(int query) const { return larger(num_sink, query - seen.window + 1 - gap); }

  // The number behind the query's own key.
  ZZ_HOST_DEVICE constexpr int end(int query) const { return query + 1 - (query < first + num_sink ? first : gap); }

  // Whether every query of the tile sees all of the `size` keys from `number` on, so that no mask is needed. Numbers
  // past the end fail, as their positions follow last_query.
  ZZ_HOST_DEVICE constexpr bool all_visible(int number, int size) const {
    const int last = number + size - 1;
    if (position(last) > first_query) return false;
    return last < num_sink || last_query - position(larger(number, num_sink)) < seen.window;
  }

 private:
  static ZZ_HOST_DEVICE constexpr int smaller(int a, int b) { return a < b ? a : b; }
  static ZZ_HOST_DEVICE constexpr int larger(int a, int b) { return a < b ? b : a; }
};

}  // namespace zigzag
