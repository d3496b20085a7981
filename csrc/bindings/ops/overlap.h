// Refuses arguments that share memory with what an op writes: two caches in one place, lengths inside a cache. What is
// then read depends on the order of threads, and a length that is overwritten is an address anywhere.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "core/error.h"

namespace zigzag::bindings {

using torch::stable::Tensor;

class [[gnu::visibility("hidden")]] MemoryCheck {  // as Tensor is
 public:
  void reads(const char* name, const Tensor& tensor) { add(name, tensor, false); }
  void writes(const char* name, const Tensor& tensor) { add(name, tensor, true); }
  void reads(const char* name, const std::optional<Tensor>& tensor) {
    if (tensor) add(name, *tensor, false);
  }
  void writes(const char* name, const std::optional<Tensor>& tensor) {
    if (tensor) add(name, *tensor, true);
  }

  // Throws where something written shares memory with another argument, or elements of it do with each other. Most
  // pairs lie in different ranges, which is all that is looked at then.
  void check() const {
    for (int i = 0; i < count_; ++i) {
      ZZ_CHECK(!parts_[i].written || !overlaps_itself(*parts_[i].tensor), parts_[i].name,
               " is written to and must have memory of its own for every element: no expanded or folded view");
      for (int j = 0; j < i; ++j) {
        const Part &a = parts_[j], &b = parts_[i];
        if (!(a.written || b.written) || a.end <= b.begin || b.end <= a.begin || are_interleaved(a, b)) continue;
        throw Error(concat(a.name, " and ", b.name, " share memory; ", a.written ? a.name : b.name,
                           " is written to and must have memory of its own"));
      }
    }
  }

 private:
  static constexpr int kMaxParts = 16;  // attention has them all

  struct Part {
    const char* name;
    const Tensor* tensor;
    bool written;
    uintptr_t begin, end;
  };

  void add(const char* name, const Tensor& tensor, bool written) {
    if (tensor.numel() == 0) return;
    int64_t last = 1;
    const auto sizes = tensor.sizes(), strides = tensor.strides();
    for (size_t dim = 0; dim < sizes.size(); ++dim) last += (sizes[dim] - 1) * strides[dim];
    const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
    parts_[count_++] = {name, &tensor, written, begin, begin + static_cast<uintptr_t>(last) * tensor.element_size()};
  }

  // Whether two elements may have one address: unless the dimensions nest, each within a step of the next larger one.
  static bool overlaps_itself(const Tensor& tensor) {
    const auto sizes = tensor.sizes(), strides = tensor.strides();
    for (size_t outer = 0; outer < sizes.size(); ++outer) {
      int64_t extent = 1;  // elements that the smaller steps span
      for (size_t dim = 0; dim < sizes.size(); ++dim) {
        const bool smaller = strides[dim] < strides[outer] || (strides[dim] == strides[outer] && dim < outer);
        if (smaller && sizes[dim] > 1) extent += (sizes[dim] - 1) * strides[dim];
      }
      if (sizes[outer] > 1 && strides[outer] < extent) return true;
    }
    return false;
  }

  // Bytes that one period of `pitch` bytes holds of the tensor, from its first byte on; 0 where it does not repeat so.
  static int64_t period(const Tensor& tensor, int64_t pitch) {
    const int64_t size = static_cast<int64_t>(tensor.element_size());
    const auto sizes = tensor.sizes(), strides = tensor.strides();
    int64_t bytes = size;
    for (size_t dim = 0; dim < sizes.size(); ++dim) {
      if (sizes[dim] > 1 && strides[dim] * size % pitch != 0) bytes += (sizes[dim] - 1) * strides[dim] * size;
    }
    return bytes <= pitch ? bytes : 0;
  }

  // Whether the tensors alternate in one range and meet nowhere, such as keys and values of [.., slots, 2, heads, dim].
  static bool are_interleaved(const Part& a, const Part& b) {
    for (const Part* part : {&a, &b}) {
      const auto strides = part->tensor->strides();
      for (size_t dim = 0; dim < strides.size(); ++dim) {
        const int64_t pitch = strides[dim] * static_cast<int64_t>(part->tensor->element_size());
        if (pitch <= 0) continue;
        const int64_t in_a = period(*a.tensor, pitch), in_b = period(*b.tensor, pitch);
        if (in_a == 0 || in_b == 0) continue;
        const uintptr_t period = static_cast<uintptr_t>(pitch);
        const uintptr_t ahead = (b.begin % period + period - a.begin % period) % period;
        if (ahead >= static_cast<uintptr_t>(in_a) && period - ahead >= static_cast<uintptr_t>(in_b)) return true;
      }
    }
    return false;
  }

  Part parts_[kMaxParts];
  int count_ = 0;
};

}  // namespace zigzag::bindings
