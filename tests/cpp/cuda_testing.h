// What the tests of CUDA kernels share: skipping without a GPU, 16-bit encodings, device memory.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <doctest/doctest.h>

#include <algorithm>
#include <vector>

#include "core/types.h"

#define CHECK_CUDA(call) REQUIRE((call) == cudaSuccess)

namespace zigzag {

inline bool no_device() {
  int count = 0;
  const bool none = cudaGetDeviceCount(&count) != cudaSuccess || count == 0;
  if (none) MESSAGE("skipped: no CUDA device");
  return none;
}

inline uint16_t encode(float x, DType dtype) {
  return dtype == DType::kFloat16 ? static_cast<__half_raw>(__float2half(x)).x
                                  : static_cast<__nv_bfloat16_raw>(__float2bfloat16(x)).x;
}

inline double decode(uint16_t bits, DType dtype) {
  if (dtype == DType::kFloat16) {
    __half_raw raw;
    raw.x = bits;
    return __half2float(__half(raw));
  }
  __nv_bfloat16_raw raw;
  raw.x = bits;
  return __bfloat162float(__nv_bfloat16(raw));
}

template <class T>
class DeviceArray {
 public:
  explicit DeviceArray(const std::vector<T>& host) : size_(host.size()) {
    CHECK_CUDA(cudaMalloc(reinterpret_cast<void**>(&data_), std::max<size_t>(size_ * sizeof(T), 16)));
    CHECK_CUDA(cudaMemcpy(data_, host.data(), size_ * sizeof(T), cudaMemcpyHostToDevice));
  }
  ~DeviceArray() { cudaFree(data_); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;

  T* data() const { return data_; }
  std::vector<T> host() const {
    std::vector<T> copy(size_);
    CHECK_CUDA(cudaMemcpy(copy.data(), data_, size_ * sizeof(T), cudaMemcpyDeviceToHost));
    return copy;
  }

 private:
  T* data_ = nullptr;
  size_t size_;
};

}  // namespace zigzag
