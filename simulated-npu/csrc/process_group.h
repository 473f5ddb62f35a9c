// "hccl": the collectives of a simulated device, carried by gloo.
#pragma once

#include <torch/csrc/distributed/c10d/Backend.hpp>

namespace simulated_npu {

// A backend that takes device tensors and runs each collective of `carrier` on their memory.
c10::intrusive_ptr<c10d::Backend> make_hccl(c10::intrusive_ptr<c10d::Backend> carrier);

}  // namespace simulated_npu
