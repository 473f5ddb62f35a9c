// What Python sees of the backend: the module `torch_npu._C`.
#include <torch/csrc/Generator.h>
#include <torch/csrc/utils/pybind.h>

#include "counters.h"
#include "device.h"
#include "generator.h"
#include "memory.h"
#include "process_group.h"

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  namespace npu = simulated_npu;
  namespace py = pybind11;

  module.def("device_count", &npu::device_count);
  module.def("device_was_used", &npu::device_was_used);
  module.def("require_usable_device", &npu::require_usable_device);
  module.def("is_bad_fork", &npu::is_bad_fork);

  py::class_<npu::MemoryStatistics>(module, "MemoryStatistics")
      .def_readonly("allocated", &npu::MemoryStatistics::allocated)
      .def_readonly("peak", &npu::MemoryStatistics::peak)
      .def_readonly("limit", &npu::MemoryStatistics::limit)
      .def_readonly("allocation_count", &npu::MemoryStatistics::allocation_count)
      .def_readonly("out_of_memory_count", &npu::MemoryStatistics::out_of_memory_count);
  module.def("memory_statistics", [](int device) { return npu::memory_statistics(device); });
  module.def("reset_peak_memory", [](int device) { npu::reset_peak_memory(device); });
  module.def("set_memory_limit", [](int device, int64_t bytes) { npu::set_memory_limit(device, bytes); });

  module.def("default_generator", [](int device) { return npu::default_generator(device); });

  module.def("count_op", &npu::count_op);
  module.def("op_counts", &npu::op_counts);
  module.def("host_sync_counts", &npu::host_sync_counts);
  module.def("copied_bytes", &npu::copied_bytes);
  module.def("reset_counts", &npu::reset_counts);
  module.def("set_counting", &npu::set_counting);

  py::module_::import("torch._C._distributed_c10d");  // pybind must know the types before a signature names them
  module.def("make_hccl", &npu::make_hccl);
}
