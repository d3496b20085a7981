// Where the example runs: memory, and the one call that runs a step. Elements are float32 on the CPU and float16 on a
// GPU.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "core/thread_pool.h"
#include "engine/captured_step.h"
#include "engine/scheduler.h"

class Machine {
 public:
  virtual ~Machine() = default;
  virtual zigzag::DType dtype() const = 0;
  virtual void* allocate(int64_t bytes) = 0;  // zeroed; lives as long as the machine
  virtual void write(void* to, const std::vector<float>& values) = 0;
  virtual std::vector<float> read(const void* from, int64_t count) = 0;
  // The numbers of a cache's heads where the device reads them; nullptr for none.
  virtual const int32_t* heads(const std::vector<int32_t>& numbers) = 0;
  // One step of `step.q_len` tokens after `held` ones in the longest row, which also advances step.seq_lens.
  virtual void run(const zigzag::Scheduler& scheduler, const zigzag::Step& step,
                   const zigzag::Scheduler::LayerCall& tensors, int64_t held) = 0;
};

class CpuMachine final : public Machine {
 public:
  zigzag::DType dtype() const override { return zigzag::DType::kFloat32; }

  void* allocate(int64_t bytes) override {
    memory_.push_back(std::make_unique<char[]>(static_cast<std::size_t>(bytes)));
    return memory_.back().get();
  }
  void write(void* to, const std::vector<float>& values) override {
    std::memcpy(to, values.data(), values.size() * sizeof(float));
  }
  std::vector<float> read(const void* from, int64_t count) override {
    const float* values = static_cast<const float*>(from);
    return {values, values + count};
  }
  const int32_t* heads(const std::vector<int32_t>&) override { return nullptr; }  // the scheduler has them

  void run(const zigzag::Scheduler& scheduler, const zigzag::Step& step, const zigzag::Scheduler::LayerCall& tensors,
           int64_t) override {
    scheduler.step_cpu(step, tensors, threads_);
    for (int row = 0; row < step.batch; ++row) step.seq_lens[row] += step.q_len;
  }

 private:
  std::vector<std::unique_ptr<char[]>> memory_;
  zigzag::ParallelFor threads_ = zigzag::make_thread_pool(2);
};

// Throws zigzag::Error where the example was built without CUDA.
std::unique_ptr<Machine> open_gpu();
