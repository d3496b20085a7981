#include "device.h"

#include <algorithm>

#include "core/error.h"

namespace zigzag::bench {

Quantiles quantiles(std::vector<double> sample) {
  ZZ_CHECK(!sample.empty(), "quantiles of an empty sample");
  std::sort(sample.begin(), sample.end());
  const auto at = [&](double fraction) {
    const double rank = fraction * static_cast<double>(sample.size() - 1);
    const std::size_t below = static_cast<std::size_t>(rank);
    const std::size_t above = std::min(below + 1, sample.size() - 1);
    return sample[below] + (rank - static_cast<double>(below)) * (sample[above] - sample[below]);
  };
  return {at(0.2), at(0.5), at(0.8)};
}

std::unique_ptr<Device> open_device(const std::string& kind, int threads) {
  ZZ_CHECK(kind == "cpu" || kind == "cuda", "--device is cpu or cuda; got '", kind, "'");
  if (kind == "cpu") return open_cpu(threads);
#if ZIGZAG_WITH_CUDA
  return open_cuda();
#else
  throw Error("this build has no CUDA kernels; build with nvcc on the PATH or ZIGZAG_CUDA=on, or pass --device cpu");
#endif
}

}  // namespace zigzag::bench
