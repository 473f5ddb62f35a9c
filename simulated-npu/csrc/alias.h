// Zero-copy views of device tensors as CPU tensors, and of CPU results as device tensors.
#pragma once

#include <ATen/core/Tensor.h>

#include <utility>
#include <vector>

#include "device.h"

namespace simulated_npu {

inline bool is_npu(const at::Tensor& tensor) {
  return tensor.defined() && tensor.device().type() == kNpu;
}

// A CPU tensor over the same memory. It does not keep the memory alive: it must not outlive `tensor`.
at::Tensor cpu_alias(const at::Tensor& tensor);

// The same, but it keeps the device storage alive: for work that outlives the call (communication).
at::Tensor owning_cpu_alias(const at::Tensor& tensor);

// One operator call: its device arguments become CPU aliases, its CPU results become device tensors.
class AliasedCall {
 public:
  // The tensor to hand to the CPU kernel. All device arguments of a call must be on one device.
  at::Tensor argument(const at::Tensor& tensor);
  // Carries resizes and new memory that the kernel gave to an alias back to the device tensor behind it.
  void write_back();
  // The device tensor for a result: the argument itself, a view of it, or new memory.
  at::Tensor result(const at::Tensor& tensor);

  void set_device(c10::DeviceIndex index);  // for factories, whose device is not that of an argument
  c10::DeviceIndex device() const;          // the device of the call: that of its tensors, else the current one
  bool has_device_arguments() const {
    return !aliases_.empty();
  }
  bool has_cpu_arguments() const {  // 0-dimensional CPU tensors count as scalars
    return has_cpu_arguments_;
  }

 private:
  std::vector<std::pair<at::Tensor, at::Tensor>> aliases_;  // (device tensor, CPU alias)
  c10::DeviceIndex device_ = -1;
  bool has_cpu_arguments_ = false;
};

}  // namespace simulated_npu
