// The operators that the CPU fallback cannot serve: allocation, copies between devices, storages, convolution (torch
// asks an accelerator for its own), and dropout (whose schema names no generator).
#include <ATen/EmptyTensor.h>
#include <ATen/Functions.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "alias.h"
#include "counters.h"
#include "generator.h"
#include "memory.h"

namespace simulated_npu {
namespace {

using at::Tensor;
using c10::IntArrayRef;
using c10::SymIntArrayRef;

const c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

// ---- allocation ----

Tensor empty(
    IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<c10::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> memory_format) {
  const c10::DeviceGuard guard(device.value_or(c10::Device(kNpu, current_device())));
  return at::detail::empty_generic(size, device_allocator(), kKeys, c10::dtype_or_default(dtype), memory_format);
}

Tensor empty_strided(
    IntArrayRef size, IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<c10::Device> device, std::optional<bool>) {
  const c10::DeviceGuard guard(device.value_or(c10::Device(kNpu, current_device())));
  return at::detail::empty_strided_generic(size, stride, device_allocator(), kKeys, c10::dtype_or_default(dtype));
}

// ---- copies ----

bool is_pinned_host(const Tensor& tensor) {
  return tensor.device().is_cpu() && is_pinned(tensor.storage().data());
}

void count_copy(const Tensor& source, const Tensor& target, bool non_blocking) {
  if (is_npu(source) && target.device().is_cpu()) {
    if (!non_blocking || !is_pinned_host(target)) count_host_sync("copy_device_to_host");
  } else if (source.device().is_cpu() && is_npu(target)) {
    if (!non_blocking || !is_pinned_host(source)) count_host_sync("copy_host_to_device");
  }
}

Tensor on_cpu(const Tensor& tensor) {
  return is_npu(tensor) ? cpu_alias(tensor) : tensor;
}

Tensor copy_from(const Tensor& source, const Tensor& target, bool non_blocking) {
  count_op("aten::_copy_from");
  count_copy(source, target, non_blocking);
  if (is_npu(source) && is_npu(target)) count_copied_bytes(static_cast<int64_t>(target.nbytes()));
  on_cpu(target).copy_(on_cpu(source));
  return target;
}

Tensor copy_from_and_resize(const Tensor& source, const Tensor& target) {
  if (target.sizes() != source.sizes()) target.resize_(source.sizes());
  return copy_from(source, target, /*non_blocking=*/false);
}

// ---- storages ----

std::vector<int64_t> contiguous_strides(IntArrayRef size) {
  std::vector<int64_t> stride(size.size(), 1);
  for (int64_t i = static_cast<int64_t>(size.size()) - 2; i >= 0; i--) {
    stride[i] = stride[i + 1] * std::max<int64_t>(size[i + 1], 1);
  }
  return stride;
}

Tensor& set_storage_and_shape(Tensor& self, c10::Storage storage, int64_t offset, IntArrayRef size, IntArrayRef stride) {
  TORCH_CHECK(storage.device().type() == kNpu, "set_: the storage is on ", storage.device(), ", the tensor on npu");
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
  const auto strides = stride.size() == size.size() ? stride.vec() : contiguous_strides(size);
  self.unsafeGetTensorImpl()->set_sizes_and_strides(size, strides, offset);
  return self;
}

Tensor& set_storage(Tensor& self, c10::Storage storage) {
  const auto count = static_cast<int64_t>(storage.nbytes() / self.itemsize());
  return set_storage_and_shape(self, std::move(storage), 0, {count}, {1});
}

Tensor& set_tensor(Tensor& self, const Tensor& source) {
  return set_storage_and_shape(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

bool has_compatible_shallow_copy_type(const Tensor& self, const Tensor& other) {
  const auto plain = [](const Tensor& t) { return t.layout() == at::kStrided && (t.is_cpu() || is_npu(t)); };
  return plain(self) && plain(other);
}

void record_stream(Tensor&, c10::Stream) {}

// ---- convolution ----

Tensor convolution(
    const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, SymIntArrayRef stride,
    SymIntArrayRef padding, SymIntArrayRef dilation, bool transposed, SymIntArrayRef output_padding,
    c10::SymInt groups) {
  count_op("aten::convolution_overrideable");
  AliasedCall call;
  const auto cpu_input = call.argument(input);
  const auto cpu_weight = call.argument(weight);
  std::optional<Tensor> cpu_bias;
  if (bias.has_value() && bias->defined()) cpu_bias = call.argument(*bias);
  TORCH_CHECK(
      !call.has_cpu_arguments(),
      "Expected all tensors to be on the same device, but found at least two devices, npu and cpu! (in convolution)");
  return call.result(at::convolution_symint(
      cpu_input, cpu_weight, cpu_bias, stride, padding, dilation, transposed, output_padding, groups));
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& grad, const Tensor& input, const Tensor& weight, SymIntArrayRef stride, SymIntArrayRef padding,
    SymIntArrayRef dilation, bool transposed, SymIntArrayRef output_padding, c10::SymInt groups,
    std::array<bool, 3> needed) {
  count_op("aten::convolution_backward_overrideable");
  AliasedCall call;
  const auto bias_size = transposed ? weight.sym_size(1) * groups : weight.sym_size(0);
  const auto [grad_input, grad_weight, grad_bias] = at::convolution_backward_symint(
      call.argument(grad), call.argument(input), call.argument(weight), std::vector<c10::SymInt>{bias_size}, stride,
      padding, dilation, transposed, output_padding, groups, needed);
  return {call.result(grad_input), call.result(grad_weight), call.result(grad_bias)};
}

// ---- dropout ----

// torch's CPU kernel would draw from the host's generator; a device draws from its own.
std::tuple<Tensor, Tensor> native_dropout(const Tensor& input, double p, std::optional<bool> train) {
  count_op("aten::native_dropout");
  AliasedCall call;
  const auto cpu_input = call.argument(input);
  const auto options = cpu_input.options().dtype(at::kBool);
  if (!train.value_or(true) || p == 0) {
    return {call.result(cpu_input.clone()), call.result(at::ones(cpu_input.sizes(), options))};
  }
  auto mask = at::empty_like(cpu_input, options);
  mask.bernoulli_(1 - p, cpu_generator_of(default_generator(call.device())));
  const auto scale = p == 1 ? 0.0 : 1 / (1 - p);
  return {call.result(cpu_input.mul(mask).mul_(scale)), call.result(mask)};
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", &empty);
  library.impl("empty_strided", &empty_strided);
  library.impl("_copy_from", &copy_from);
  library.impl("_copy_from_and_resize", &copy_from_and_resize);
  library.impl("set_.source_Storage", &set_storage);
  library.impl("set_.source_Tensor", &set_tensor);
  library.impl("set_.source_Storage_storage_offset", &set_storage_and_shape);
  library.impl("_has_compatible_shallow_copy_type", &has_compatible_shallow_copy_type);
  library.impl("record_stream", &record_stream);
  library.impl("convolution_overrideable", &convolution);
  library.impl("convolution_backward_overrideable", &convolution_backward);
  library.impl("native_dropout", &native_dropout);
}

// It is no part of autograd. torch before 2.10 does not pass a backend's own kernel by there without being told.
TORCH_LIBRARY_IMPL(aten, AutogradPrivateUse1, library) {
  library.impl("_has_compatible_shallow_copy_type", torch::CppFunction::makeFallthrough());
}

}  // namespace
}  // namespace simulated_npu
