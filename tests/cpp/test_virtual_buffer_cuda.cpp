// Buffers that grow where they stand, on a GPU.
#if ZIGZAG_WITH_CUDA
#include <doctest/doctest.h>

#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "cuda_testing.h"
#include "error_text.h"
#include "kv/virtual_buffer.h"

namespace {

using namespace zigzag;
using zigzag::testing::error_of;

constexpr int64_t kTerabyte = int64_t{1} << 40;

}  // namespace

TEST_CASE("VirtualBuffer on the GPU: grows without moving, keeps its contents, fails whole and gives memory back") {
  if (no_device()) return;
  CHECK(error_of([] { device_address_space(1000); }).find("there is no CUDA device 1000") != std::string::npos);
  const auto free_bytes = [] { return device_address_space(0)->free_bytes(); };
  const int64_t free_before = free_bytes();
  {
    VirtualBuffer buffer(device_address_space(0), 2, kTerabyte / 4);
    const int64_t page = buffer.page_bytes();
    CHECK(page >= 1 << 16);
    buffer.commit(1);
    CHECK(buffer.committed_bytes() == 2 * page);
    char* const second_row = buffer.data() + buffer.row_stride();
    CHECK_CUDA(cudaMemset(second_row, 7, static_cast<size_t>(page)));
    buffer.commit(16 * page);
    CHECK_CUDA(cudaMemset(second_row + page, 8, static_cast<size_t>(15 * page)));
    std::vector<unsigned char> host(static_cast<size_t>(16 * page));
    CHECK_CUDA(cudaMemcpy(host.data(), second_row, host.size(), cudaMemcpyDeviceToHost));
    CHECK(host.front() == 7);
    CHECK(host[static_cast<size_t>(page - 1)] == 7);
    CHECK(host[static_cast<size_t>(page)] == 8);
    CHECK(host.back() == 8);
    CHECK(error_of<OutOfMemory>([&] { buffer.commit(kTerabyte / 4); }).find("out of memory") != std::string::npos);
    CHECK(buffer.committed_bytes() == 32 * page);
    CHECK_CUDA(cudaMemcpy(host.data(), second_row, host.size(), cudaMemcpyDeviceToHost));
    CHECK(host.back() == 8);
    CHECK(free_bytes() <= free_before - 32 * page);
    buffer.release();
    CHECK(free_bytes() > free_before - 32 * page);
    buffer.commit(page);
    CHECK_CUDA(cudaMemset(second_row, 9, static_cast<size_t>(page)));
    CHECK_CUDA(cudaDeviceSynchronize());
  }
}

TEST_CASE("VirtualBuffer on the GPU: pages go one by one, and an extended buffer has the memory of the old one") {
  if (no_device()) return;
  VirtualBuffer buffer(device_address_space(0), 2, int64_t{1} << 30);
  const int64_t page = buffer.page_bytes();
  const auto byte = [](const char* at) {
    char value = 0;
    CHECK_CUDA(cudaMemcpy(&value, at, 1, cudaMemcpyDeviceToHost));
    return value;
  };
  buffer.commit(8 * page);
  char* const second_row = buffer.data() + buffer.row_stride();
  CHECK_CUDA(cudaMemset(second_row, 3, static_cast<size_t>(8 * page)));
  const int64_t free_at_first = device_address_space(0)->free_bytes();
  buffer.shrink_row(1, 5 * page);
  buffer.shrink_row(0, 0);
  CHECK(buffer.committed_bytes() == 5 * page);
  CHECK(device_address_space(0)->free_bytes() == free_at_first + 11 * page);
  buffer.commit_row(1, 40 * page);
  CHECK_CUDA(cudaMemset(second_row + 5 * page, 6, static_cast<size_t>(35 * page)));
  buffer.shrink_row(1, 30 * page);
  CHECK(byte(second_row + 5 * page - 1) == 3);
  CHECK(byte(second_row + 5 * page) == 6);
  CHECK(byte(second_row + 30 * page - 1) == 6);
  buffer.shrink_row(1, 5 * page);
  CHECK(device_address_space(0)->free_bytes() == free_at_first + 11 * page);
  CHECK(byte(second_row + 5 * page - 1) == 3);
  const int64_t free_before = device_address_space(0)->free_bytes();
  VirtualBuffer longer(device_address_space(0), int64_t{1} << 32, buffer);
  CHECK(device_address_space(0)->free_bytes() > free_before - 5 * page);
  buffer.release();
  CHECK(longer.committed_row_bytes(0) == 0);
  CHECK(longer.committed_row_bytes(1) == 5 * page);
  CHECK(byte(longer.data() + longer.row_stride() + 5 * page - 1) == 3);
  longer.commit_row(1, 6 * page);
  CHECK_CUDA(cudaMemset(longer.data() + longer.row_stride(), 4, static_cast<size_t>(6 * page)));
  CHECK(byte(longer.data() + longer.row_stride() + 6 * page - 1) == 4);
}

TEST_CASE("VirtualBuffer on the GPU: a capture survives that buffers go, whatever its stream and mode") {
  if (no_device()) return;
  cudaStream_t watched = nullptr, blocking = nullptr;
  CHECK_CUDA(cudaStreamCreateWithFlags(&watched, cudaStreamNonBlocking));
  CHECK_CUDA(cudaStreamCreate(&blocking));
  watch_captures(0, {watched});
  for (cudaStream_t stream : {watched, blocking}) {
    for (const cudaStreamCaptureMode mode : {cudaStreamCaptureModeGlobal, cudaStreamCaptureModeThreadLocal}) {
      VirtualBuffer buffer(device_address_space(0), 1, int64_t{1} << 30);
      auto dying = std::make_unique<VirtualBuffer>(device_address_space(0), 1, int64_t{1} << 30);
      buffer.commit(1);
      dying->commit(16 * buffer.page_bytes());
      const int64_t free_before = device_address_space(0)->free_bytes();
      CHECK_CUDA(cudaStreamBeginCapture(stream, mode));
      CHECK_CUDA(cudaMemsetAsync(buffer.data(), 1, 16, stream));
      std::thread([&] { dying.reset(); }).join();
      buffer.commit(2 * buffer.page_bytes());
      buffer.release();
      CHECK(buffer.committed_bytes() == 2 * buffer.page_bytes());
      cudaGraph_t graph = nullptr;
      CHECK_CUDA(cudaStreamEndCapture(stream, &graph));
      CHECK_CUDA(cudaGraphDestroy(graph));
      buffer.release();
      CHECK(device_address_space(0)->free_bytes() >= free_before + 16 * buffer.page_bytes());
    }
  }
}
#endif
