#include "device.h"

#include <algorithm>
#include <utility>

#include "core/error.h"

namespace zigzag::bench {
namespace {

constexpr int kMaxCalls = 32, kMinCalls = 4;         // between two clock readings
constexpr int64_t kBytesPerReading = 4'000'000'000;  // about 1.3 ms of traffic on an H100

}  // namespace

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

std::vector<Quantiles> Device::time(const std::vector<Call>& calls, int num_sets, int64_t bytes_per_call) {
  const int64_t calls_per_reading =
      std::clamp<int64_t>(kBytesPerReading / std::max<int64_t>(bytes_per_call, 1), kMinCalls, kMaxCalls);
  std::vector<Quantiles> result;
  for (auto& microseconds : sample(calls, num_sets, static_cast<int>(calls_per_reading))) {
    result.push_back(quantiles(std::move(microseconds)));
  }
  return result;
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
