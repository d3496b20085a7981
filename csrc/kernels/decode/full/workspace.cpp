#include "kernels/decode/full/workspace.h"

#include <algorithm>

#include "kernels/decode/full/full.h"

namespace zigzag {

int64_t decode_full_workspace_bytes() {
  int64_t most = 0;
  for (const int head_dim : kHeadDims) most = std::max(most, decode_full::workspace_bytes(head_dim));
  return most;
}

}  // namespace zigzag
