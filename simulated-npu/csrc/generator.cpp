#include "generator.h"

#include <ATen/CPUGeneratorImpl.h>

#include <vector>

namespace simulated_npu {
namespace {

// Kernels run on the CPU, so numbers come from a CPU generator; it is one of the device's own, so that seeding,
// saving and restoring the device's state neither reads nor disturbs the host's.
struct NpuGenerator final : c10::GeneratorImpl {
  at::Generator cpu;

  NpuGenerator(c10::DeviceIndex index, at::Generator source)
      : GeneratorImpl(c10::Device(kNpu, index), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)),
        cpu(std::move(source)) {}
  explicit NpuGenerator(c10::DeviceIndex index)
      : NpuGenerator(index, at::detail::createCPUGenerator(c10::default_rng_seed_val)) {}

  static c10::DeviceType device_type() {
    return kNpu;
  }
  void set_current_seed(uint64_t seed) override {
    cpu.set_current_seed(seed);
  }
  uint64_t current_seed() const override {
    return cpu.current_seed();
  }
  uint64_t seed() override {
    return cpu.seed();
  }
  void set_offset(uint64_t) override {
    TORCH_CHECK(false, "the simulated NPU's generator has no Philox offset");
  }
  uint64_t get_offset() const override {
    TORCH_CHECK(false, "the simulated NPU's generator has no Philox offset");
  }
  void set_state(const c10::TensorImpl& state) override {
    cpu.unsafeGetGeneratorImpl()->set_state(state);
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return cpu.unsafeGetGeneratorImpl()->get_state();
  }
  NpuGenerator* clone_impl() const override {
    return new NpuGenerator(device().index(), cpu.clone());
  }
};

}  // namespace

const at::Generator& default_generator(c10::DeviceIndex index) {
  static const std::vector<at::Generator> generators = [] {
    std::vector<at::Generator> fresh;
    for (int i = 0; i < kMaxDevices; i++) fresh.push_back(at::make_generator<NpuGenerator>(i));
    return fresh;
  }();
  if (index < 0) index = current_device();
  check_device(index);
  return generators[index];
}

at::Generator new_generator(c10::DeviceIndex index) {
  if (index < 0) index = current_device();
  check_device(index);
  return at::make_generator<NpuGenerator>(index);
}

const at::Generator& cpu_generator_of(const at::Generator& generator) {
  TORCH_CHECK(
      generator.device().type() == kNpu, "Expected a 'npu' device type for generator but found '",
      c10::DeviceTypeName(generator.device().type(), true), "'");
  return static_cast<NpuGenerator*>(generator.unsafeGetGeneratorImpl())->cpu;
}

}  // namespace simulated_npu
