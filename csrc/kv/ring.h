// Slot arithmetic of a cache layer, for host and device.
//
//   full cache (window == 0):  slot = position
//   ring       (window >= 1):  slots [0, sink) hold the first `sink` positions for ever, the `span` slots behind them
//                              the last ones, oldest overwritten first; span >= window
//
//     position  0 1 | 2 3 4 5 6 7 8      sink 2, window 4, 6 slots: span 4; 9 tokens seen
//     slot      0 1 | 2 3 4 5 2 3 4      slots 2..5 now hold positions 6 7 8 5
//
//     position  0 1 | 2 3 4 5 6 7 8      sink 2, window 3, 7 slots: span 5, of which 2 are slack; 9 tokens seen
//     slot      0 1 | 2 3 4 5 6 2 3      slots 2..6 now hold positions 7 8 4 5 6
//
// A ring whose slack, span - window, is at least k - 1 can take back its last k tokens: a length that is k less. What
// they overwrote no later query sees. So slots outside the window may hold anything: positions too old, tokens taken
// back. Where a ring lies over a buffer that is to hold every position (slots of them: slot = position), they may have
// no memory. Kernels find keys by position and read no others; attention.h has the one exception.
//
// Keys are cached after RoPE at absolute positions, so the order of slots means nothing to the softmax.
#pragma once

#include <cstdint>

#include "core/host_device.h"

namespace zigzag {

struct RingLayout {
  int sink;
  int window;  // 0 marks a full cache
  int slots;   // of a ring at least sink + window; 0 stands for just those. Not used of a full cache

  ZZ_HOST_DEVICE constexpr bool is_full() const { return window == 0; }

  // Slots behind the sinks.
  ZZ_HOST_DEVICE constexpr int span() const { return slots == 0 ? window : slots - sink; }

  // Slot that holds `position`. A full cache may return a slot past its capacity: the caller checks.
  ZZ_HOST_DEVICE constexpr int slot(int position) const {
    return is_full() || position < sink ? position : sink + (position - sink) % span();
  }

  // Slots that `length` tokens have been written to: always a prefix of the slots.
  ZZ_HOST_DEVICE constexpr int used_slots(int length) const {
    return is_full() || length - sink < span() ? length : sink + span();
  }

  // Position of the token in `slot` that is one of the first `sink` or the last `window` of `length` tokens, or -1
  // where there is none.
  ZZ_HOST_DEVICE constexpr int position(int slot, int length) const {
    if (slot >= used_slots(length)) return -1;
    if (is_full() || slot < sink) return slot;
    const int offset = slot - sink;
    const int held = slot + (length - sink - 1 - offset) / span() * span();
    return held >= length - window ? held : -1;
  }

  // Whether the query at position `query` attends the key at position `key`. A streaming layer sees [0, sink) and
  // (query - window, query]; the query itself counts in the window and no token is counted twice.
  ZZ_HOST_DEVICE constexpr bool visible(int key, int query) const {
    return key >= 0 && key <= query && (is_full() || key < sink || query - key < window);
  }

  // Whether appending positions up to `last` (exclusive) still leaves `position` in the cache.
  ZZ_HOST_DEVICE constexpr bool survives(int position, int last) const {
    return is_full() || position < sink || position >= last - span();
  }
};

}  // namespace zigzag
