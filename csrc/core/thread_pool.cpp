#include "core/thread_pool.h"

#include <atomic>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "core/error.h"

namespace zigzag {
namespace {

using Body = std::function<void(int64_t, int64_t)>;

// Idle threads watch for work this many turns before they sleep: waking costs tens of microseconds, a decode layer not
// more.
constexpr int kSpinTurns = 20000;

class ThreadPool {
 public:
  explicit ThreadPool(int num_threads) : num_threads_(num_threads) {
    threads_.reserve(static_cast<std::size_t>(num_threads - 1));
    try {
      for (int i = 1; i < num_threads; ++i) threads_.emplace_back([this, i] { serve(i); });
    } catch (const std::system_error& error) {
      const std::size_t started = threads_.size();
      stop();
      throw Error(concat("a thread pool of ", num_threads, " threads could start ", started, " of the ",
                         num_threads - 1, " that it adds to the caller's: ", error.what()));
    }
  }

  ~ThreadPool() { stop(); }

  void run(int64_t count, const Body& body) {
    if (count <= 0) return;
    const std::lock_guard<std::mutex> one_caller(callers_);
    start(&body, count);
    part(0);
    wait_until(finished_, [this] { return unfinished_.load(std::memory_order_acquire) == 0; });
    if (error_ != nullptr) std::rethrow_exception(std::exchange(error_, nullptr));
  }

 private:
  void stop() {
    start(nullptr, 0);
    for (std::thread& thread : threads_) thread.join();
  }

  template <class Condition>
  void wait_until(std::condition_variable& signal, Condition condition) {
    for (int turn = 0; turn < kSpinTurns; ++turn) {
      if (condition()) return;
    }
    std::unique_lock<std::mutex> lock(mutex_);
    signal.wait(lock, condition);
  }

  void start(const Body* body, int64_t count) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      body_ = body;
      count_ = count;
      unfinished_.store(num_threads_ - 1, std::memory_order_relaxed);
      generation_.fetch_add(1, std::memory_order_release);
    }
    started_.notify_all();
  }

  void serve(int index) {
    for (int64_t seen = 0;;) {
      wait_until(started_, [&] { return generation_.load(std::memory_order_acquire) != seen; });
      ++seen;
      if (body_ == nullptr) return;
      part(index);
      if (unfinished_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
        const std::lock_guard<std::mutex> lock(mutex_);
        finished_.notify_one();
      }
    }
  }

  void part(int64_t index) {
    try {
      const int64_t begin = count_ * index / num_threads_, end = count_ * (index + 1) / num_threads_;
      if (begin < end) (*body_)(begin, end);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (error_ == nullptr) error_ = std::current_exception();
    }
  }

  const int num_threads_;
  std::mutex callers_, mutex_;
  std::condition_variable started_, finished_;
  std::atomic<int64_t> generation_{0}, unfinished_{0};
  const Body* body_ = nullptr;
  int64_t count_ = 0;
  std::exception_ptr error_;
  std::vector<std::thread> threads_;  // last: the threads use everything above
};

}  // namespace

ParallelFor make_thread_pool(int num_threads) {
  ZZ_CHECK(num_threads >= 1, "a thread pool needs at least 1 thread, got ", num_threads);
  ParallelFor parallel;
  parallel.num_threads = num_threads;
  parallel.run = [pool = std::make_shared<ThreadPool>(num_threads)](int64_t count, const Body& body) {
    pool->run(count, body);
  };
  return parallel;
}

}  // namespace zigzag
