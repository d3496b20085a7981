// Both decode kernels on the GPU against double precision on the CPU: see decode_case.h.
#if ZIGZAG_WITH_CUDA
#include "decode_case.h"

namespace zigzag::decode_test {

// heads, group, q_len, head_dim, slots, sink, window, lengths, padding

TEST_CASE("decode_full: every head_dim, with one and two row tiles") {
  std::vector<DecodeCase> cases;
  for (const int head_dim : kHeadDims) {
    cases.push_back({2, 4, 1, head_dim, 200, 0, 0, {0, 1, 15, 16, 17, 150}, {}});
    cases.push_back({1, 3, 5, head_dim, 300, 0, 0, {290, 129}, {}});
    cases.push_back({1, 4, 7, head_dim, 300, 0, 0, {290, 129}, {}});
  }
  check_both_dtypes(cases);
}

TEST_CASE("RoPE: every head_dim, partial and whole, full caches and rings, one and several new tokens") {
  std::vector<DecodeCase> cases;
  for (const int head_dim : kHeadDims) {
    cases.push_back({2, 4, 1, head_dim, 200, 0, 0, {0, 1, 16, 150}, {}, head_dim, true});
    cases.push_back({1, 3, 5, head_dim, 300, 0, 0, {290, 129}, {}, head_dim / 2, false});
    cases.push_back({2, 4, 1, head_dim, 68, 4, 64, {0, 3, 4, 67, 68, 132, 1000}, {}, head_dim, false});
    cases.push_back({1, 5, 7, head_dim, 68, 4, 64, {0, 2, 61, 64, 1000}, {}, 8, true});
  }
  check_both_dtypes(cases);
}

TEST_CASE("RoPE: clusters, splits, many rows, padding, no free slot, no cache") {
  check_both_dtypes({
      {8, 4, 1, 128, 1100, 0, 0, {1099}, {}, 128, true},
      {8, 16, 1, 128, 64, 0, 0, {63}, {}, 72, false},
      {3, 1, 1, 96, 2000, 0, 0, {1999, 0, 7, 900}, {}, 96, false},
      {2, 16, 16, 64, 100, 0, 0, {60, 0}, {}, 64, true},
      {2, 7, 6, 128, 100, 0, 0, {50, 20, 0, 3}, {0, 6, 3, 5}, 64, false},
      {1, 4, 4, 128, 34, 0, 0, {30, 31, 34}, {}, 128, false},
      {1, 4, 1, 128, 34, 0, 0, {34, 33}, {}, 128, false},
      {2, 4, 3, 128, 0, 0, 0, {0, 0}, {}, 128, false},
      {1, 4, 16, 128, 3, 0, 3, {0, 1, 2, 50}, {}, 128, false},
      {8, 4, 1, 128, 320, 64, 256, {100, 5000}, {}, 128, true},
      {2, 16, 16, 80, 320, 64, 256, {319, 5000}, {}, 80, false},
      {2, 3, 6, 128, 40, 8, 32, {0, 39, 40, 500}, {6, 5, 0, 2}, 24, false},
      {2, 3, 1, 128, 40, 8, 32, {0, 39, 40, 500}, {1, 0, 1, 0}, 24, true},
      {64, 1, 1, 64, 48, 16, 32, {20, 47, 100}, {}, 64, false},
      {2, 4, 5, 128, 0, 8, 32, {0, 0}, {}, 64, false},
      {2, 4, 1, 128, 0, 8, 32, {0, 0}, {}, 64, false},
  });
}

TEST_CASE("decode_full: clusters and splits of a head, several heads of a block") {
  check_both_dtypes({
      {8, 4, 1, 128, 1100, 0, 0, {1099}, {}},                // one cluster per head
      {8, 4, 1, 128, 64, 0, 0, {3}, {}},                     // most blocks of the cluster have nothing
      {1, 16, 1, 64, 5000, 0, 0, {4999}, {}},                // many blocks on one head
      {3, 1, 1, 96, 2000, 0, 0, {1999, 0, 7, 900, 64}, {}},  // ragged: blocks span heads, heads span blocks
      {40, 2, 1, 80, 50, 0, 0, {49, 1, 20, 33}, {}},         // more heads than SMs
  });
}

TEST_CASE("decode_full: clusters of 16 where there are few heads") {
  check_both_dtypes({
      {4, 4, 1, 128, 1300, 0, 0, {1299}, {}},
      {4, 16, 1, 128, 1300, 0, 0, {1200}, {}, 128, true},
      {5, 7, 2, 80, 1300, 0, 0, {1298}, {}},
      {2, 3, 1, 256, 700, 0, 0, {5, 690, 0}, {}},
      {4, 4, 4, 64, 400, 0, 0, {300}, {2}},
      {4, 4, 8, 128, 1300, 0, 0, {1290}, {}},  // 32 rows
      {5, 11, 3, 80, 900, 0, 0, {897}, {1}},   // 33 rows: a second block of them
  });
}

// Long enough that a head has tiles for several clusters, and warps whose first tile is asked for once the length is
// known; then a few tokens only, so that most of them have nothing.
TEST_CASE("decode_full: several clusters per head where there are few heads") {
  check_both_dtypes({
      {1, 8, 1, 128, 40000, 0, 0, {39999}, {}},
      {1, 8, 1, 128, 40000, 0, 0, {5}, {}, 128, true},
      {1, 8, 1, 128, 40000, 0, 0, {0}, {}},
      {1, 8, 1, 128, 2048, 0, 0, {2048}, {}},  // no free slot
      {2, 16, 1, 128, 20000, 0, 0, {19990}, {}, 64, false},
      {4, 8, 1, 128, 9000, 0, 0, {8999}, {}},
      {3, 5, 1, 64, 9000, 0, 0, {4097}, {}},
      {2, 7, 1, 80, 9000, 0, 0, {8000}, {}},
      {1, 12, 1, 96, 9000, 0, 0, {8191}, {}},
      {1, 9, 1, 256, 9000, 0, 0, {8999}, {}},
      {1, 4, 4, 128, 9000, 0, 0, {8990}, {2}},  // several new tokens: two row tiles
      {1, 8, 8, 128, 9000, 0, 0, {8990}, {}},   // 64 rows
  });
}

// One row of the batch, so that all query rows of a head share a read of its keys where the GPU has a kernel for that.
TEST_CASE("decode_full: from 17 to 256 query rows over one read of the keys") {
  check_both_dtypes({
      {1, 3, 6, 128, 200, 0, 0, {0}, {}},
      {1, 3, 6, 128, 200, 0, 0, {1}, {}, 128, true},
      {8, 4, 8, 128, 2000, 0, 0, {1990}, {}},
      {8, 4, 8, 128, 2000, 0, 0, {127}, {}, 128, false},  // new keys on both sides of a tile's border
      {8, 4, 8, 64, 300, 0, 0, {63}, {3}, 64, true},
      {4, 7, 8, 128, 9000, 0, 0, {8985}, {}, 64, false},
      {2, 4, 16, 64, 9000, 0, 0, {8000}, {15}},
      {2, 5, 13, 128, 700, 0, 0, {640}, {}, 128, true},  // 65 rows: both warpgroups
      {4, 8, 16, 128, 5000, 0, 0, {4901}, {2}, 128, true},
      {1, 16, 16, 128, 3000, 0, 0, {2900}, {}, 128, false},  // 256 rows: two tiles of them
      {2, 16, 9, 64, 3000, 0, 0, {2047}, {9}},               // nothing but padding
      {1, 8, 4, 128, 34, 0, 0, {32}, {}, 128, true},         // the last tokens find no slot
      {1, 8, 4, 128, 34, 0, 0, {34}, {}, 32, false},
      {2, 4, 6, 128, 0, 0, 0, {0}, {}, 128, true},
  });
}

TEST_CASE("decode_full: from 17 to 256 query rows, tiles that the cache holds, more heads than clusters") {
  check_both_dtypes({
      {8, 4, 8, 128, 4096, 0, 0, {2048}, {}, 128, false, true},  // of the first tiles all lie in the cache
      {8, 4, 16, 128, 4100, 0, 0, {4085}, {1}, 128, false},
      {4, 8, 16, 64, 4096, 0, 0, {4096}, {}, 0, false, true},  // no free slot, 128 rows
      {8, 4, 8, 128, 64, 0, 0, {64}, {}, 128, false},          // one tile, all of it cached
      {8, 4, 8, 128, 2048, 0, 0, {1500}, {8}},                 // nothing but padding behind first tiles
      {32, 4, 8, 64, 100, 0, 0, {77}, {}},
      {64, 4, 8, 64, 100, 0, 0, {77}, {}},          // more heads than clusters find a place
      {8, 2, 9, 64, 26000, 0, 0, {25500}, {}, 64},  // hundreds of tiles
  });
}

TEST_CASE("decode_full: many rows, padding, a full cache, no cache") {
  check_both_dtypes({
      {2, 16, 16, 64, 100, 0, 0, {60, 0}, {}},
      {2, 7, 6, 128, 100, 0, 0, {50, 20, 0, 3}, {0, 6, 3, 5}},
      {1, 4, 4, 128, 34, 0, 0, {30, 31, 34}, {}},  // the last tokens find no slot
      {2, 4, 3, 128, 0, 0, 0, {0, 0}, {}},
      {2, 4, 1, 256, 0, 0, 0, {0}, {}},
  });
}

TEST_CASE("decode_stream: every head_dim, every state of the ring") {
  std::vector<DecodeCase> cases;
  for (const int head_dim : kHeadDims) {
    cases.push_back({2, 4, 1, head_dim, 68, 4, 64, {0, 3, 4, 5, 67, 68, 69, 131, 132, 133, 1000}, {}});
    cases.push_back({1, 5, 7, head_dim, 68, 4, 64, {0, 2, 61, 64, 68, 131, 1000}, {}});
  }
  check_both_dtypes(cases);
}

TEST_CASE("decode_stream: tiny rings, long rings, many rows, padding, no cache") {
  check_both_dtypes({
      {1, 4, 1, 128, 1, 0, 1, {0, 1, 2, 50}, {}},
      {1, 4, 16, 128, 3, 0, 3, {0, 1, 2, 50}, {}},  // the chunk is longer than the window
      {1, 4, 9, 64, 6, 4, 2, {0, 1, 3, 50}, {}},
      {8, 4, 1, 128, 320, 64, 256, {100, 5000}, {}},
      {2, 16, 16, 80, 320, 64, 256, {319, 5000}, {}},  // 16 row blocks read before anything is overwritten
      {2, 4, 1, 96, 4100, 100, 4000, {10, 4099, 9000}, {}},
      {64, 1, 1, 64, 48, 16, 32, {20, 47, 100}, {}},
      {2, 3, 6, 128, 40, 8, 32, {0, 39, 40, 500}, {6, 5, 0, 2}},
      {2, 3, 1, 128, 40, 8, 32, {0, 39, 40, 500}, {1, 0, 1, 0}},
      {2, 4, 5, 128, 0, 8, 32, {0, 0}, {}},
      {2, 4, 1, 128, 0, 8, 32, {0, 0}, {}},
  });
}

// Of a ring with slack whatever is outside the window is NaN: tokens taken back, or no memory.

TEST_CASE("decode_stream: rings with slack, every head_dim, every state of the ring") {
  std::vector<DecodeCase> cases;
  for (const int head_dim : kHeadDims) {
    cases.push_back({2, 4, 1, head_dim, 73, 4, 64, {0, 3, 4, 5, 67, 68, 69, 72, 73, 74, 131, 141, 142, 1000}, {}});
    cases.push_back({1, 5, 7, head_dim, 73, 4, 64, {0, 2, 61, 66, 68, 73, 135, 1000}, {}});
  }
  check_both_dtypes(cases);
}

TEST_CASE(
    "decode_stream: every length over a small ring with slack, one and several tokens, with and without clusters") {
  std::vector<int32_t> all;
  for (int length = 0; length < 120; ++length) all.push_back(length);
  check_both_dtypes({
      {1, 2, 1, 64, 45, 5, 33, all, {}},
      {1, 2, 3, 64, 45, 5, 33, all, {}},
      {1, 2, 1, 64, 19, 0, 16, {0, 1, 15, 16, 17, 18, 19, 20, 34, 35, 36, 37, 38, 39}, {}},
      {1, 2, 1, 64, 40, 20, 1, {0, 19, 20, 21, 39, 40, 41, 60}, {}},
      {1, 2, 16, 64, 40, 20, 1, {0, 19, 20, 21, 39, 40, 41, 60}, {}},
      {1, 2, 16, 64, 21, 2, 3, {0, 1, 2, 5, 20, 21, 22, 50}, {}},  // the chunk is longer than the window, not than the
                                                                   // ring
  });
}

TEST_CASE("decode_stream: slack of a rollback, a window over a buffer for every token, many rows, RoPE, padding") {
  check_both_dtypes({
      {8, 4, 1, 128, 340, 64, 256, {100}, {}, 128, true},
      {8, 4, 1, 128, 340, 64, 256, {330}, {}},
      {8, 4, 1, 128, 384, 64, 256, {5000}, {}},  // tiles that hold nothing of the window
      {64, 4, 1, 128, 384, 64, 256, {5003, 330}, {}, 128, false},
      {8, 4, 1, 128, 340, 64, 256, {5000}, {}, 128, false},
      {8, 4, 4, 128, 340, 64, 256, {5000, 339}, {}, 128, true},
      {2, 16, 16, 80, 340, 64, 256, {319, 5000}, {}, 80, false},
      {64, 1, 1, 64, 60, 16, 32, {20, 47, 100, 59}, {}, 64, false},  // no clusters, by position
      {33, 1, 1, 64, 60, 16, 32, {20, 100}, {}, 64, false},          // no clusters, by slot
      {2, 4, 1, 128, 3000, 4, 100, {0, 3, 50, 104, 105, 2000, 2999}, {}, 128, false},
      {2, 4, 1, 128, 3000, 20, 100, {2500, 3100, 3300}, {}},
      {8, 4, 1, 64, 9000, 64, 1024, {8999}, {}, 64, true},
      {2, 4, 5, 96, 3000, 4, 100, {0, 3, 50, 104, 105, 2000, 2990}, {}},
      {2, 3, 6, 128, 47, 8, 32, {0, 39, 40, 500}, {6, 5, 0, 2}, 24, false},
      {2, 3, 1, 128, 47, 8, 32, {0, 39, 40, 500}, {1, 0, 1, 0}, 24, true},
      {2, 3, 1, 128, 247, 8, 32, {0, 39, 40, 500}, {1, 0, 1, 0}, 24, true},
  });
}

TEST_CASE("padding beyond the chunk counts as the whole chunk, below zero as none") {
  check_both_dtypes({
      {2, 2, 1, 64, 60, 0, 0, {20, 40, 7}, {-3, 9, 1}},
      {2, 2, 5, 64, 60, 0, 0, {20, 40, 7}, {-3, 9, 2}},
      {2, 2, 1, 64, 40, 4, 36, {20, 90, 7}, {-3, 9, 1}},
      {2, 2, 5, 64, 40, 4, 36, {20, 90, 7}, {-3, 9, 2}},
  });
}

}  // namespace zigzag::decode_test
#endif
