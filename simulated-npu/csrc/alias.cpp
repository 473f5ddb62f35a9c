#include "alias.h"

#include "memory.h"

namespace simulated_npu {
namespace {

at::Tensor tensor_over(c10::Storage storage, c10::DispatchKey key, const at::Tensor& like) {
  auto tensor = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype());
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  if (like.is_conj()) tensor._set_conj(true);
  if (like.is_neg()) tensor._set_neg(true);
  return tensor;
}

// A view keeps what its base is to autograd: in inference mode, a view of an ordinary tensor is an ordinary tensor.
at::Tensor view_over(const at::Tensor& base, const at::Tensor& like) {
  auto view = at::detail::make_tensor<c10::TensorImpl>(
      c10::TensorImpl::VIEW, c10::Storage(base.storage()), base.key_set(), like.dtype());
  view.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  view._set_conj(like.is_conj());
  view._set_neg(like.is_neg());
  return view;
}

c10::Storage storage_over(c10::DataPtr memory, size_t bytes, c10::Allocator* allocator) {
  return c10::Storage(c10::Storage::use_byte_size_t{}, bytes, std::move(memory), allocator, /*resizable=*/true);
}

}  // namespace

at::Tensor cpu_alias(const at::Tensor& tensor) {
  const auto& storage = tensor.storage();
  c10::DataPtr memory(const_cast<void*>(storage.data()), c10::Device(c10::kCPU));
  return tensor_over(
      storage_over(std::move(memory), storage.nbytes(), c10::GetAllocator(c10::kCPU)), c10::DispatchKey::CPU, tensor);
}

at::Tensor owning_cpu_alias(const at::Tensor& tensor) {
  auto* keep = new c10::Storage(tensor.storage());
  c10::DataPtr memory(
      const_cast<void*>(keep->data()), keep, [](void* context) { delete static_cast<c10::Storage*>(context); },
      c10::Device(c10::kCPU));
  return tensor_over(
      storage_over(std::move(memory), keep->nbytes(), c10::GetAllocator(c10::kCPU)), c10::DispatchKey::CPU, tensor);
}

at::Tensor AliasedCall::argument(const at::Tensor& tensor) {
  if (!tensor.defined()) return tensor;
  if (!is_npu(tensor)) {
    if (tensor.dim() > 0 && tensor.device().is_cpu()) has_cpu_arguments_ = true;
    return tensor;
  }
  if (device_ < 0) device_ = tensor.device().index();
  TORCH_CHECK(
      device_ == tensor.device().index(),
      "Expected all tensors to be on the same device, but found at least two devices, npu:", static_cast<int>(device_),
      " and ", tensor.device(), "!");
  for (const auto& [device, alias] : aliases_) {
    if (device.is_same(tensor)) return alias;
  }
  aliases_.emplace_back(tensor, cpu_alias(tensor));
  return aliases_.back().second;
}

void AliasedCall::write_back() {
  for (auto& [tensor, alias] : aliases_) {
    if (alias.storage().data() != tensor.storage().data()) {
      tensor.storage().set_data_ptr_noswap(adopt(alias.storage(), device_));
      tensor.storage().set_nbytes(alias.storage().nbytes());
    }
    if (alias.sizes() != tensor.sizes() || alias.strides() != tensor.strides() ||
        alias.storage_offset() != tensor.storage_offset()) {
      tensor.unsafeGetTensorImpl()->set_sizes_and_strides(alias.sizes(), alias.strides(), alias.storage_offset());
    }
  }
}

at::Tensor AliasedCall::result(const at::Tensor& tensor) {
  if (!tensor.defined() || !tensor.device().is_cpu()) return tensor;
  for (const auto& [device, alias] : aliases_) {
    if (alias.is_same(tensor)) return device;
  }
  for (const auto& [device, alias] : aliases_) {
    if (alias.storage().unsafeGetStorageImpl() == tensor.storage().unsafeGetStorageImpl()) {
      return view_over(device, tensor);
    }
  }
  return tensor_over(
      storage_over(adopt(tensor.storage(), device()), tensor.storage().nbytes(), device_allocator()),
      c10::DispatchKey::PrivateUse1, tensor);
}

void AliasedCall::set_device(c10::DeviceIndex index) {
  if (device_ < 0) device_ = index;
}

c10::DeviceIndex AliasedCall::device() const {
  return device_ < 0 ? current_device() : device_;
}

}  // namespace simulated_npu
