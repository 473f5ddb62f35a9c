// What torch's core asks an accelerator: device switching, streams, events, generators, pinned memory.
//
// Every kernel runs to its end before the call returns, so streams and events only keep identity and time: waiting is
// always satisfied. Synchronizing is counted (counters.h), because a real device would stall there.
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <algorithm>
#include <chrono>
#include <cstring>

#include "counters.h"
#include "device.h"
#include "generator.h"
#include "memory.h"

namespace simulated_npu {
namespace {

using c10::Device;
using c10::DeviceIndex;
using c10::Stream;

struct Hooks final : at::PrivateUse1HooksInterface {
  void init() const override {
    require_usable_device();
  }
  bool isBuilt() const override {
    return true;
  }
  bool isAvailable() const override {
    return true;
  }
  bool hasPrimaryContext(DeviceIndex) const override {
    return device_was_used();
  }
  DeviceIndex deviceCount() const override {
    return static_cast<DeviceIndex>(device_count());
  }
  DeviceIndex getCurrentDevice() const override {
    return current_device();
  }
  void setCurrentDevice(DeviceIndex index) const override {
    set_current_device(index);
  }
  DeviceIndex exchangeDevice(DeviceIndex index) const override {
    return exchange_current_device(index);
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex index) const override {
    return exchange_current_device(index);
  }
  const at::Generator& getDefaultGenerator(DeviceIndex index) const override {
    return default_generator(index);
  }
  at::Generator getNewGenerator(DeviceIndex index) const override {
    return new_generator(index);
  }
  bool isPinnedPtr(const void* pointer) const override {
    return is_pinned(pointer);
  }
  c10::Allocator* getPinnedMemoryAllocator() const override {
    return pinned_allocator();
  }
  Device getDeviceFromPtr(void*) const override {
    return Device(kNpu, current_device());
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    const c10::DeviceGuard guard(storage.device());
    auto memory = device_allocator()->allocate(bytes);
    if (bytes > 0 && storage.data() != nullptr) {
      std::memcpy(memory.get(), storage.data(), std::min<size_t>(bytes, storage.nbytes()));
    }
    storage.set_data_ptr_noswap(std::move(memory));
    storage.set_nbytes(bytes);
  }
};

struct Event {
  std::chrono::steady_clock::time_point time;
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override {
    return kNpu;
  }
  Device getDevice() const override {
    return Device(kNpu, current_device());
  }
  void setDevice(Device device) const override {
    if (device.has_index()) set_current_device(device.index());
  }
  Device exchangeDevice(Device device) const override {
    const auto previous = getDevice();
    setDevice(device);
    return previous;
  }
  void uncheckedSetDevice(Device device) const noexcept override {
    exchange_current_device(device.index());
  }
  DeviceIndex deviceCount() const noexcept override {
    return static_cast<DeviceIndex>(device_count());
  }

  Stream getStream(Device device) const override {
    const auto index = index_or_current(device);
    return Stream(Stream::UNSAFE, Device(kNpu, index), current_stream(index));
  }
  Stream getDefaultStream(Device device) const override {
    return Stream(Stream::DEFAULT, Device(kNpu, index_or_current(device)));
  }
  Stream getNewStream(Device device, int /*priority*/) const override {
    return Stream(Stream::UNSAFE, Device(kNpu, index_or_current(device)), new_stream());
  }
  Stream getStreamFromGlobalPool(Device device, bool /*high_priority*/) const override {
    return getNewStream(device, 0);
  }
  Stream exchangeStream(Stream stream) const override {
    const auto index = stream.device_index();
    return Stream(Stream::UNSAFE, stream.device(), exchange_current_stream(index, stream.id()));
  }
  bool queryStream(const Stream&) const override {
    return true;
  }
  void synchronizeStream(const Stream&) const override {
    count_host_sync("synchronize");
  }
  void synchronizeDevice(DeviceIndex) const override {
    count_host_sync("synchronize");
  }

  void record(void** event, const Stream&, DeviceIndex, c10::EventFlag) const override {
    if (*event == nullptr) *event = new Event;
    static_cast<Event*>(*event)->time = std::chrono::steady_clock::now();
  }
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override {
    return true;
  }
  void synchronizeEvent(void*) const override {
    count_host_sync("synchronize");
  }
  void destroyEvent(void* event, DeviceIndex) const noexcept override {
    delete static_cast<Event*>(event);
  }
  double elapsedTime(void* start, void* end, DeviceIndex) const override {
    const std::chrono::duration<double, std::milli> elapsed =
        static_cast<Event*>(end)->time - static_cast<Event*>(start)->time;
    return elapsed.count();
  }
  void recordDataPtrOnStream(const c10::DataPtr&, const Stream&) const override {}
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Registration {
  Registration() {
    at::RegisterPrivateUse1HooksInterface(new Hooks);  // torch keeps it for the life of the process
  }
} g_registration;

}  // namespace
}  // namespace simulated_npu
