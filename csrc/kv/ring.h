// Slot arithmetic of a cache layer, for host and device.
//
//   full cache (window == 0):  slot = position
//   ring       (window >= 1):  slots [0, sink) hold the first `sink` positions for ever,
//                              slots [sink, sink + window) hold the last `window` positions, oldest overwritten first
//
//     position  0 1 | 2 3 4 5 6 7 8      sink 2, window 4, 9 tokens seen
//     slot      0 1 | 2 3 4 5 2 3 4      slots 2..5 now hold positions 6 7 8 5
//
// Keys are cached after RoPE at absolute positions, so the order of slots means nothing to the softmax.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define ZZ_HOST_DEVICE __host__ __device__ __forceinline__
#else
// Always inlined: a function that the CPU kernels of two instruction sets share by name must not be a symbol.
#define ZZ_HOST_DEVICE __attribute__((always_inline)) inline
#endif

namespace zigzag {

struct RingLayout {
  int sink;
  int window;  // 0 marks a full cache

  ZZ_HOST_DEVICE constexpr bool is_full() const { return window == 0; }

  // Slot that holds `position`. A full cache may return a slot past its capacity: the caller checks.
  ZZ_HOST_DEVICE constexpr int slot(int position) const {
    return is_full() || position < sink ? position : sink + (position - sink) % window;
  }

  // Slots in use after `length` tokens: always a prefix of the slots.
  ZZ_HOST_DEVICE constexpr int used_slots(int length) const {
    return is_full() || length < sink + window ? length : sink + window;
  }

  // Position held by `slot` after `length` tokens, or -1 if nothing was written there yet.
  ZZ_HOST_DEVICE constexpr int position(int slot, int length) const {
    if (slot >= used_slots(length)) return -1;
    if (is_full() || slot < sink) return slot;
    const int offset = slot - sink;
    return sink + offset + (length - sink - 1 - offset) / window * window;
  }

  // Whether the query at position `query` attends the key at position `key`. A streaming layer sees [0, sink) and
  // (query - window, query]; the query itself counts in the window and no token is counted twice.
  ZZ_HOST_DEVICE constexpr bool visible(int key, int query) const {
    return key >= 0 && key <= query && (is_full() || key < sink || query - key < window);
  }

  // Whether appending positions [first, last) still leaves `position` in the cache.
  ZZ_HOST_DEVICE constexpr bool survives(int position, int last) const {
    return is_full() || position < sink || position >= last - window;
  }
};

}  // namespace zigzag
