#include "kv/key_runs.h"

namespace zigzag {

KeyRuns visible_runs(const RingLayout& layout, int slots, int length, int pad, int first_query, int last_query) {
  KeyRuns keys;
  const auto add = [&](bool cached, bool pinned, int row, int position, int count) {
    const int skip = pinned ? 0 : std::max(0, first_query - layout.window + 1 - position);
    const int kept = std::min(count, last_query + 1 - position) - skip;
    if (kept <= 0) return;
    keys.runs[keys.num_runs++] = {cached, pinned, row + skip, position + skip, kept};
    keys.num_keys += kept;
  };
  const int sink = layout.is_full() ? std::max(length, last_query + 1) : layout.sink;
  if (slots > 0) {
    add(true, true, 0, 0, std::min({sink, length, slots}));
    if (length > sink) {
      const int oldest = std::max(sink, length - layout.window), slot = layout.slot(oldest);
      const int before_wrap = std::min(length - oldest, slots - slot);
      add(true, false, slot, oldest, before_wrap);
      add(true, false, sink, oldest + before_wrap, length - oldest - before_wrap);
    }
  }
  const int pinned = std::max(0, std::min(sink, last_query + 1) - length);
  add(false, true, pad, length, pinned);
  add(false, false, pad + pinned, length + pinned, last_query + 1 - length - pinned);
  return keys;
}

}  // namespace zigzag
