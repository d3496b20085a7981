// Four functions of cuBLAS by name. Their signatures and the values of their enumerations are part of its ABI since
// CUDA 11 (cublas_api.h, library_types.h).
#include "cublas.h"

#include <dlfcn.h>

#include "core/error.h"

namespace zigzag::bench {
namespace {

constexpr int64_t kWorkspaceBytes = 32 << 20;  // what cuBLAS asks for on sm_90
constexpr int kNotTransposed = 0, kTransposed = 1;
constexpr int kFloat16 = 2, kBFloat16 = 14;  // cudaDataType_t
constexpr int kComputeFloat32 = 68;          // cublasComputeType_t
constexpr int kDefaultAlgorithm = -1;

using Create = int(void** handle);
using Destroy = int(void* handle);
using SetStream = int(void* handle, void* stream);
using SetWorkspace = int(void* handle, void* workspace, std::size_t bytes);
using GemmEx = int(void* handle, int op_a, int op_b, int m, int n, int k, const void* alpha, const void* a, int type_a,
                   int lda, const void* b, int type_b, int ldb, const void* beta, void* c, int type_c, int ldc,
                   int compute_type, int algorithm);

// Stays loaded until the program ends.
void* load() {
  for (const char* name : {"libcublas.so", "libcublas.so.13", "libcublas.so.12"}) {
    if (void* library = dlopen(name, RTLD_NOW | RTLD_LOCAL)) return library;
  }
  throw Error(concat(
      "projections need cuBLAS: libcublas.so, .so.13 or .so.12 on LD_LIBRARY_PATH (a torch installation has one in "
      "site-packages/nvidia/cu13/lib or nvidia/cublas/lib); ",
      dlerror()));
}

template <class Function>
Function* find(void* library, const char* name) {
  void* symbol = dlsym(library, name);
  ZZ_CHECK(symbol != nullptr, "libcublas has no ", name);
  return reinterpret_cast<Function*>(symbol);
}

void check(int status, const char* call) { ZZ_CHECK(status == 0, call, " failed with cuBLAS status ", status); }

}  // namespace

Cublas::Cublas(Device& device, void* stream) : library_(load()), workspace_(device.allocate(kWorkspaceBytes)) {
  void* handle = nullptr;
  check(find<Create>(library_, "cublasCreate_v2")(&handle), "cublasCreate");
  handle_ = {handle, find<Destroy>(library_, "cublasDestroy_v2")};
  check(find<SetStream>(library_, "cublasSetStream_v2")(handle, stream), "cublasSetStream");
  check(find<SetWorkspace>(library_, "cublasSetWorkspace_v2")(handle, workspace_.get(), kWorkspaceBytes),
        "cublasSetWorkspace");
}

// cuBLAS is column-major: the row-major out [rows, out_features] is its out_features x rows matrix.
void Cublas::linear(const Device::Linear& l) {
  ZZ_CHECK(l.dtype != DType::kFloat32, "projections take bf16 and fp16; got fp32");
  const int type = l.dtype == DType::kFloat16 ? kFloat16 : kBFloat16;
  const float one = 1, zero = 0;
  check(find<GemmEx>(library_, "cublasGemmEx")(handle_.get(), kTransposed, kNotTransposed, l.out_features, l.rows,
                                               l.in_features, &one, l.weight, type, l.in_features, l.in, type,
                                               l.in_features, &zero, l.out, type, l.out_features, kComputeFloat32,
                                               kDefaultAlgorithm),
        "cublasGemmEx");
}

}  // namespace zigzag::bench
