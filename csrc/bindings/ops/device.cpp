#include "bindings/ops/device.h"

#include <dlfcn.h>
#include <torch/csrc/stable/ops.h>

#include "core/error.h"

namespace zigzag::bindings {

void* current_cuda_stream(const torch::stable::Tensor& tensor) {
  // Looked up at run time so that one binary also loads where torch has no CUDA. The stable ABI itself hands out the
  // raw stream only from torch 2.13 on.
  using GetStream = int32_t (*)(int32_t device_index, void** stream);
  static const GetStream get_stream = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
    return library ? reinterpret_cast<GetStream>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  ZZ_CHECK(get_stream,
           "a CUDA tensor was given, but libtorch_cuda.so with aoti_torch_get_current_cuda_stream is not loaded");
  void* stream = nullptr;
  ZZ_CHECK(get_stream(tensor.get_device_index(), &stream) == 0, "torch could not tell the current CUDA stream");
  return stream;
}

ParallelFor torch_parallel_for() {
  ParallelFor parallel;
  parallel.num_threads = static_cast<int>(torch::stable::get_num_threads());
  parallel.run = [](int64_t count, const std::function<void(int64_t, int64_t)>& body) {
    if (count > 0) torch::stable::parallel_for(0, count, 1, body);
  };
  return parallel;
}

}  // namespace zigzag::bindings
