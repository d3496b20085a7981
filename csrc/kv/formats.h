// The list of quantised formats. A format is one file with a struct: kFormat, kBits (4 or 8) per element, kMaxCode,
// encode and decode of one element, and widen2 for the tensor cores of a GPU. What turns vectors into codes and back is
// written once over this interface.
#pragma once

#include "kv/format_fp8.h"
#include "kv/format_int4.h"
#include "kv/format_int8.h"

namespace zigzag {

// f(Format{}) with the struct of `format`; nothing for kPlain, which has no codes.
template <class F>
void dispatch_kv_format(KvFormat format, F&& f) {
  switch (format) {
    case KvFormat::kFp8: return f(Fp8{});
    case KvFormat::kInt8: return f(Int8{});
    case KvFormat::kInt4: return f(Int4{});
    case KvFormat::kPlain: return;
  }
}

}  // namespace zigzag
