#include "device.h"

#include <c10/util/Exception.h>
#include <pthread.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>

namespace simulated_npu {
namespace {

int count_from_environment() {
  const char* text = std::getenv("SIMULATED_NPU_COUNT");
  if (text == nullptr || *text == '\0') return 1;
  char* end = nullptr;
  const long count = std::strtol(text, &end, 10);
  TORCH_CHECK(
      *end == '\0' && count >= 1 && count <= kMaxDevices,
      "SIMULATED_NPU_COUNT must be a whole number from 1 to ", kMaxDevices, ", got '", text, "'");
  return static_cast<int>(count);
}

thread_local c10::DeviceIndex t_device = 0;
thread_local std::array<c10::StreamId, kMaxDevices> t_stream{};  // 0 is the default stream

std::atomic<bool> g_used{false};
std::atomic<bool> g_bad_fork{false};

void after_fork_in_child() {
  if (g_used) g_bad_fork = true;
}

}  // namespace

int device_count() {
  static const int count = count_from_environment();
  return count;
}

void check_device(c10::DeviceIndex index) {
  TORCH_CHECK(
      index >= 0 && index < device_count(),
      "Invalid NPU device ordinal ", static_cast<int>(index), ": ", device_count(), " simulated device(s) exist");
}

c10::DeviceIndex current_device() {
  return t_device;
}

c10::DeviceIndex exchange_current_device(c10::DeviceIndex index) {
  const auto previous = t_device;
  if (index >= 0) t_device = index;
  return previous;
}

void set_current_device(c10::DeviceIndex index) {
  check_device(index);
  t_device = index;
}

c10::DeviceIndex index_or_current(c10::Device device) {
  return device.has_index() ? device.index() : t_device;
}

c10::StreamId current_stream(c10::DeviceIndex index) {
  return t_stream[index];
}

c10::StreamId exchange_current_stream(c10::DeviceIndex index, c10::StreamId stream) {
  const auto previous = t_stream[index];
  t_stream[index] = stream;
  return previous;
}

c10::StreamId new_stream() {
  static std::atomic<c10::StreamId> next{1};
  return next++;
}

void require_usable_device() {
  TORCH_CHECK(
      !g_bad_fork,
      "Cannot re-initialize NPU in forked subprocess. To use NPU with multiprocessing, you must use the 'spawn' start "
      "method");
  if (!g_used.exchange(true)) pthread_atfork(nullptr, nullptr, &after_fork_in_child);
}

bool device_was_used() {
  return g_used;
}

bool is_bad_fork() {
  return g_bad_fork;
}

}  // namespace simulated_npu
