#include "kernels/decode/full/workspace.h"

#include "kernels/decode/full/full.h"

namespace zigzag {

int64_t decode_full_workspace_bytes(int /*batch*/, int /*num_q_heads*/, int /*num_kv_heads*/, int head_dim) {
  return decode_full::workspace_bytes(head_dim);
}

}  // namespace zigzag
