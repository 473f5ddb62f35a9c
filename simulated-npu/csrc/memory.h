// Device memory (host memory with a budget per device) and pinned host memory.
#pragma once

#include <c10/core/Allocator.h>
#include <c10/core/Storage.h>

#include <cstdint>

#include "device.h"

namespace simulated_npu {

struct MemoryStatistics {
  int64_t allocated = 0;          // bytes held now
  int64_t peak = 0;               // most bytes held since the last reset
  int64_t limit = 0;              // bytes the device has
  int64_t allocation_count = 0;   // allocations since the start
  int64_t out_of_memory_count = 0;
};

MemoryStatistics memory_statistics(c10::DeviceIndex index);
void reset_peak_memory(c10::DeviceIndex index);
void set_memory_limit(c10::DeviceIndex index, int64_t bytes);

c10::Allocator* device_allocator();
c10::Allocator* pinned_allocator();
bool is_pinned(const void* pointer);

// Counts memory that a CPU kernel allocated as memory of device `index`, and keeps `owner` alive as long as the result.
c10::DataPtr adopt(const c10::Storage& owner, c10::DeviceIndex index);

}  // namespace simulated_npu
