#include "memory.h"

#include "counters.h"

#include <c10/core/CachingDeviceAllocator.h>
#include <c10/util/Exception.h>
#include <torch/version.h>

#include <array>
#include <cstdlib>
#include <cstring>
#include <iomanip>
#include <map>
#include <memory>
#include <mutex>
#include <sstream>

namespace simulated_npu {
namespace {

constexpr int64_t kDefaultLimit = int64_t{64} << 30;  // an Ascend 910B has 64 GiB
constexpr size_t kAlignment = 64;

std::mutex g_mutex;

std::array<MemoryStatistics, kMaxDevices>& all_statistics() {
  static auto statistics = [] {
    std::array<MemoryStatistics, kMaxDevices> fresh;
    for (auto& one : fresh) one.limit = kDefaultLimit;
    return fresh;
  }();
  return statistics;
}

std::string readable(int64_t bytes) {
  std::ostringstream text;
  text << std::fixed << std::setprecision(2);
  if (bytes < 1 << 10) {
    text << bytes << " bytes";
  } else if (bytes < 1 << 20) {
    text << bytes / 1024.0 << " KiB";
  } else if (bytes < 1 << 30) {
    text << bytes / 1048576.0 << " MiB";
  } else {
    text << bytes / 1073741824.0 << " GiB";
  }
  return text.str();
}

// Takes `bytes` from the device's budget or throws what the caching allocator of a real device throws.
void charge(c10::DeviceIndex index, int64_t bytes) {
  require_usable_device();
  const std::lock_guard<std::mutex> lock(g_mutex);
  auto& statistics = all_statistics()[index];
  if (statistics.allocated + bytes > statistics.limit) {
    statistics.out_of_memory_count++;
    TORCH_CHECK_WITH(
        OutOfMemoryError, false,
        "NPU out of memory. Tried to allocate ", readable(bytes), " (NPU ", static_cast<int>(index), "; ",
        readable(statistics.limit), " total capacity; ", readable(statistics.allocated), " already allocated; ",
        readable(statistics.allocated), " current active; ", readable(statistics.limit - statistics.allocated),
        " free; ", readable(statistics.allocated), " reserved in total by PyTorch) [simulated NPU]");
  }
  statistics.allocated += bytes;
  statistics.allocation_count++;
  // A stand-in operator's own scratch is no memory of the real one's; what it returns counts from the next piece on.
  if (is_counting()) statistics.peak = std::max(statistics.peak, statistics.allocated);
}

void refund(c10::DeviceIndex index, int64_t bytes) {
  const std::lock_guard<std::mutex> lock(g_mutex);
  all_statistics()[index].allocated -= bytes;
}

// One piece of device memory. It is either memory of our own, or memory that a CPU kernel allocated (`owner`).
struct Block {
  void* own = nullptr;
  c10::Storage owner;
  c10::DeviceIndex index = 0;
  int64_t bytes = 0;

  static void destroy(void* context) {
    const std::unique_ptr<Block> block(static_cast<Block*>(context));
    refund(block->index, block->bytes);
    std::free(block->own);
  }
};

void* aligned_host_memory(size_t bytes) {
  if (bytes == 0) return nullptr;
  void* pointer = nullptr;
  TORCH_CHECK_WITH(
      OutOfMemoryError, posix_memalign(&pointer, kAlignment, bytes) == 0,
      "the host has no ", bytes, " bytes left for the simulated NPU");
  return pointer;
}

// torch.accelerator.memory_* reads a DeviceAllocator. It came after torch 2.7 and changed until 2.13: before, an npu has
// torch_npu's own figures alone.
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 13
#define SIMULATED_NPU_TELLS_TORCH_ITS_MEMORY
using AllocatorBase = c10::DeviceAllocator;
#else
using AllocatorBase = c10::Allocator;
#endif

// There is no cache: what is freed is gone at once.
struct DeviceMemory final : AllocatorBase {
  c10::DataPtr allocate(size_t bytes) override {
    const auto index = current_device();
    charge(index, static_cast<int64_t>(bytes));
    void* pointer = aligned_host_memory(bytes);
    auto* block = new Block{pointer, c10::Storage(), index, static_cast<int64_t>(bytes)};
    return {pointer, block, &Block::destroy, c10::Device(kNpu, index)};
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return nullptr;  // a block is freed through its context, never by a bare pointer
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
#ifdef SIMULATED_NPU_TELLS_TORCH_ITS_MEMORY
  bool initialized() override {
    return device_was_used();
  }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex index) override {
    const auto now = memory_statistics(index);
    c10::CachingDeviceAllocator::DeviceStats statistics;
    const auto aggregate = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
    for (auto* bytes : {&statistics.allocated_bytes, &statistics.reserved_bytes, &statistics.active_bytes}) {
      (*bytes)[aggregate].current = now.allocated;
      (*bytes)[aggregate].peak = now.peak;
    }
    statistics.num_ooms = now.out_of_memory_count;
    return statistics;
  }
  void resetAccumulatedStats(c10::DeviceIndex) override {}
  void resetPeakStats(c10::DeviceIndex index) override {
    reset_peak_memory(index);
  }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex index) override {
    const auto now = memory_statistics(index);
    return {static_cast<size_t>(now.limit - now.allocated), static_cast<size_t>(now.limit)};
  }
#endif
};

// Pinned blocks by address, so that a view into one is known to be pinned too.
std::map<const char*, size_t>& pinned_blocks() {
  static std::map<const char*, size_t> blocks;
  return blocks;
}

void free_pinned(void* pointer) {
  {
    const std::lock_guard<std::mutex> lock(g_mutex);
    pinned_blocks().erase(static_cast<const char*>(pointer));
  }
  std::free(pointer);
}

struct PinnedMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    require_usable_device();
    void* pointer = aligned_host_memory(bytes);
    if (pointer != nullptr) {
      const std::lock_guard<std::mutex> lock(g_mutex);
      pinned_blocks()[static_cast<const char*>(pointer)] = bytes;
    }
    return {pointer, pointer, &free_pinned, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return &free_pinned;
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
};

DeviceMemory g_device_memory;
PinnedMemory g_pinned_memory;

struct Registration {
  Registration() {
    c10::SetAllocator(kNpu, &g_device_memory);
  }
} g_registration;

}  // namespace

MemoryStatistics memory_statistics(c10::DeviceIndex index) {
  check_device(index);
  const std::lock_guard<std::mutex> lock(g_mutex);
  return all_statistics()[index];
}

void reset_peak_memory(c10::DeviceIndex index) {
  check_device(index);
  const std::lock_guard<std::mutex> lock(g_mutex);
  all_statistics()[index].peak = all_statistics()[index].allocated;
}

void set_memory_limit(c10::DeviceIndex index, int64_t bytes) {
  check_device(index);
  TORCH_CHECK(bytes > 0, "a memory limit must be positive, got ", bytes);
  const std::lock_guard<std::mutex> lock(g_mutex);
  all_statistics()[index].limit = bytes;
}

c10::Allocator* device_allocator() {
  return &g_device_memory;
}

c10::Allocator* pinned_allocator() {
  return &g_pinned_memory;
}

bool is_pinned(const void* pointer) {
  const auto* address = static_cast<const char*>(pointer);
  const std::lock_guard<std::mutex> lock(g_mutex);
  auto after = pinned_blocks().upper_bound(address);
  if (after == pinned_blocks().begin()) return false;
  const auto& [start, bytes] = *std::prev(after);
  return address < start + bytes;
}

c10::DataPtr adopt(const c10::Storage& owner, c10::DeviceIndex index) {
  const auto bytes = static_cast<int64_t>(owner.nbytes());
  charge(index, bytes);
  auto* block = new Block{nullptr, owner, index, bytes};
  return {const_cast<void*>(owner.data()), block, &Block::destroy, c10::Device(kNpu, index)};
}

}  // namespace simulated_npu
