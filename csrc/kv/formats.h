// The list of quantised formats. A format is one file with a struct: kFormat, kBits (4 or 8) per element, kMaxCode,
// encode and decode of one element, and what the tensor cores of a GPU need. What turns vectors into codes and back is
// written once over this interface.
//
// On a GPU codes become pairs of float16, in as few instructions as there are: times a unit, a power of two, and for
// integers with an offset, which the kernels take off again. With n = 32 / kBits:
//
//   widen_row      n neighbouring codes of one vector: pair i holds elements e and e + kApart, from e = 0 on
//   widen_columns  n / 2 neighbouring codes of a vector, then those of another one: pair i holds code i of both
//   unit(i)        pair i holds (code + an offset) * unit(i), exactly; unit(i + 2) is unit(i)
//   offset(i)      bits of the float16 offset * unit(i), a subnormal or 0; offset(i + 2) is offset(i)
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
