#include "kernels/decode/full/workspace.h"

#include <algorithm>
#include <iterator>

#include "kernels/decode/full/full.h"

namespace zigzag {

int64_t decode_full_workspace_bytes() {
  return decode_full::workspace_bytes(*std::max_element(std::begin(kHeadDims), std::end(kHeadDims)));
}

}  // namespace zigzag
