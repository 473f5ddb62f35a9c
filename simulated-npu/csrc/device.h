// Which simulated devices exist, and which one this thread works on.
//
// The backend takes the place that torch reserves for out-of-tree accelerators (DeviceType::PrivateUse1); Python
// renames that device type to "npu".
#pragma once

#include <c10/core/Device.h>
#include <c10/core/Stream.h>

namespace simulated_npu {

constexpr c10::DeviceType kNpu = c10::DeviceType::PrivateUse1;
constexpr int kMaxDevices = 16;

// SIMULATED_NPU_COUNT, 1 by default; read once, when the library is loaded.
int device_count();

c10::DeviceIndex current_device();
c10::DeviceIndex exchange_current_device(c10::DeviceIndex index);  // returns the previous one; no range check
void set_current_device(c10::DeviceIndex index);                   // throws for a device that does not exist
void check_device(c10::DeviceIndex index);
c10::DeviceIndex index_or_current(c10::Device device);

c10::StreamId current_stream(c10::DeviceIndex index);
c10::StreamId exchange_current_stream(c10::DeviceIndex index, c10::StreamId stream);
c10::StreamId new_stream();

// As on an Ascend, the device belongs to the process that first used it: a forked child of that process may hold CPU
// tensors, but any device work in it fails. `require_usable_device` marks the first use, or throws in such a child.
void require_usable_device();
bool device_was_used();
bool is_bad_fork();

}  // namespace simulated_npu
