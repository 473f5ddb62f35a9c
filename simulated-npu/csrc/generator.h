// The random number generator of a simulated device.
#pragma once

#include <ATen/core/Generator.h>

#include "device.h"

namespace simulated_npu {

const at::Generator& default_generator(c10::DeviceIndex index);  // -1: the current device
at::Generator new_generator(c10::DeviceIndex index);             // -1: the current device

// The CPU generator that draws the numbers of `generator`, which must be one of ours.
const at::Generator& cpu_generator_of(const at::Generator& generator);

}  // namespace simulated_npu
