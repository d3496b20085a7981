#include "core/types.h"

#include "core/error.h"
#include "core/shown.h"

namespace zigzag {

DType parse_dtype(const std::string& given) {
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    if (given == name(dtype)) return dtype;
  }
  throw Error(concat("dtype \"", shown(given), "\" is not supported; supported: float32, float16, bfloat16"));
}

KvFormat parse_kv_format(const std::string& given) {
  std::string supported;
  for (const KvFormat format : kKvFormats) {
    if (given == name(format)) return format;
    supported += (supported.empty() ? "" : ", ") + std::string(name(format));
  }
  throw Error(concat("KV format \"", shown(given), "\" is not supported; supported: ", supported));
}

}  // namespace zigzag
