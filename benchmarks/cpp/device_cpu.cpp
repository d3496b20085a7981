// The CPU as a benchmark device: a thread pool, a steady clock around every call.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <thread>

#include "core/error.h"
#include "core/thread_pool.h"
#include "device.h"
#include "element.h"
#include "kernels/attention.h"
#include "random.h"

namespace zigzag::bench {
namespace {

constexpr int kAlignment = 64;
constexpr double kSecondsPerCall = 1.0;
constexpr int kMinRounds = 15, kMaxRounds = 2000;  // after one round of warm-up

std::string cpu_model() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);) {
    if (line.rfind("model name", 0) == 0) return line.substr(line.find(':') + 2);
  }
  return "CPU";
}

uint64_t sum_words(const uint64_t* words, int64_t begin, int64_t end) {
  uint64_t sum[8] = {};  // independent chains, so that loads and not additions set the pace
  for (int64_t i = begin; i < end; ++i) {
    for (int lane = 0; lane < 8; ++lane) sum[lane] += words[i * 8 + lane];
  }
  return sum[0] + sum[1] + sum[2] + sum[3] + sum[4] + sum[5] + sum[6] + sum[7];
}

class Cpu final : public Device {
 public:
  explicit Cpu(int threads) : parallel_(make_thread_pool(threads)) {}

  std::string name() const override {
    return cpu_model() + " (" + std::to_string(parallel_.num_threads) +
           (parallel_.num_threads == 1 ? " thread)" : " threads)");
  }
  std::string driver() const override { return "-"; }

  std::shared_ptr<void> allocate(int64_t bytes) override {
    const int64_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    void* data = std::aligned_alloc(kAlignment, static_cast<std::size_t>(std::max<int64_t>(rounded, kAlignment)));
    ZZ_CHECK(data != nullptr, "cannot allocate ", bytes, " bytes of CPU memory");
    std::memset(data, 0, static_cast<std::size_t>(rounded));
    return {data, std::free};
  }

  void upload(void* to, const void* from, int64_t bytes) override {
    std::memcpy(to, from, static_cast<std::size_t>(bytes));
  }
  void download(void* to, const void* from, int64_t bytes) override { upload(to, from, bytes); }

  void fill_normal(void* data, int64_t count, DType dtype, float sigma, uint64_t seed) override {
    parallel_.run(count, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        store_element(data, i, dtype, sigma * random_normal(seed, static_cast<uint64_t>(i)));
      }
    });
  }

  void attention(const AttentionParams& params) override { attention_cpu(params, parallel_); }
  std::function<void()> prepare(const Scheduler& scheduler, const Step& step, const Scheduler::LayerCall& tensors,
                                const std::function<void()>& after, int64_t) override {
    return [this, &scheduler, step, tensors, after] {
      scheduler.step_cpu(step, tensors, parallel_);
      if (after) after();
    };
  }
  void linear(const Linear&) override { throw Error("projections run on CUDA only; pass --device cuda or --gemm 0"); }

  void read(const void* a, const void* b, int64_t bytes_each) override {
    for (const void* data : {a, b}) {
      parallel_.run(bytes_each / 64, [&](int64_t begin, int64_t end) {
        sink_.fetch_add(sum_words(static_cast<const uint64_t*>(data), begin, end), std::memory_order_relaxed);
      });
    }
  }

  void copy(void* to, const void* from, int64_t bytes) override {
    parallel_.run(bytes, [&](int64_t begin, int64_t end) {
      std::memcpy(static_cast<char*>(to) + begin, static_cast<const char*>(from) + begin,
                  static_cast<std::size_t>(end - begin));
    });
  }

  std::vector<std::vector<double>> sample(const std::vector<Call>& calls, int num_sets, int) override {
    using Clock = std::chrono::steady_clock;
    const int count = static_cast<int>(calls.size());
    const auto elapsed = [](Clock::time_point since) {
      return std::chrono::duration<double>(Clock::now() - since).count();
    };
    std::vector<std::vector<double>> microseconds(calls.size());
    const auto begin = Clock::now();
    for (int round = -1; round < kMaxRounds && (round < kMinRounds || elapsed(begin) < kSecondsPerCall * count);
         ++round) {
      for (int c = 0; c < count; ++c) {
        const Call& call = calls[static_cast<std::size_t>(c)];
        const int set = ((round + 1) * count + c) % num_sets;
        if (call.before) call.before(set);
        const auto start = Clock::now();
        call.run(set);
        if (round >= 0) microseconds[static_cast<std::size_t>(c)].push_back(elapsed(start) * 1e6);
      }
    }
    return microseconds;
  }

 private:
  ParallelFor parallel_;
  std::atomic<uint64_t> sink_{0};  // keeps the reads from being optimised away
};

}  // namespace

std::unique_ptr<Device> open_cpu(int threads) {
  return std::make_unique<Cpu>(threads > 0 ? threads : std::max(1u, std::thread::hardware_concurrency()));
}

}  // namespace zigzag::bench
