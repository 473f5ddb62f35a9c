// What ran on the simulated device, and where the host would have waited for a real one.
//
// An accelerator runs behind the host; whatever needs a device value on the host (`.item()`, a blocking copy, an output
// whose shape depends on data) drains its queue. Training loops must not do that per layer, so tests count it here.
#pragma once

#include <cstdint>
#include <map>
#include <string>

namespace simulated_npu {

using Counts = std::map<std::string, int64_t>;

void count_op(const std::string& name);
Counts op_counts();

void count_host_sync(const std::string& kind);
Counts host_sync_counts();

// From one tensor of the device to another: `.contiguous()` of a view is such a copy.
void count_copied_bytes(int64_t bytes);
int64_t copied_bytes();

void reset_counts();

// The stand-in operators look at tensor values to refuse wrong calls and are built from many small operators; the real
// ones do and are neither, so what happens inside them is not counted. For this thread; returns what was set before.
bool set_counting(bool enabled);
bool is_counting();

}  // namespace simulated_npu
