// The one kernel behind almost every operator: run torch's CPU kernel over aliases of the device tensors.
//
// It refuses what a real accelerator refuses: tensors of two devices in one call, and a generator of another device.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <unordered_set>

#include "alias.h"
#include "counters.h"
#include "generator.h"

namespace simulated_npu {
namespace {

using c10::IValue;

// Their result (or its shape) needs values from the device, so a real device would be drained.
const std::unordered_set<std::string> kReadsDevice{
    "aten::_local_scalar_dense", "aten::_unique",       "aten::_unique2",
    "aten::bincount",            "aten::equal",         "aten::masked_select",
    "aten::nonzero",             "aten::unique_consecutive", "aten::unique_dim",
    "aten::unique_dim_consecutive"};

const std::unordered_set<std::string> kIndexing{
    "aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"};

bool is_mask(const at::Tensor& index) {
  return index.defined() && (index.scalar_type() == at::kBool || index.scalar_type() == at::kByte);
}

// Assigning through a mask looks for its nonzero positions (reading through one calls aten::nonzero, which counts);
// repeat_interleave without output_size sums the repeats.
bool reads_device(const std::string& name, const c10::FunctionSchema& schema, at::ArrayRef<IValue> arguments) {
  if (kReadsDevice.count(name) > 0) return true;
  if (name == "aten::_index_put_impl_") {
    for (const std::optional<at::Tensor>& index : arguments[1].toOptionalTensorList()) {
      if (index.has_value() && is_mask(*index)) return true;
    }
  }
  return name == "aten::repeat_interleave" && schema.overload_name() == "Tensor" && arguments[1].isNone();
}

// op-plugin's _fused_adamw_ never reads them (FusedAdamWKernelNpuOpApi.cpp, branches 7.2.0 to master): a step with
// gradients that are not finite moves the weights all the same.
bool is_ignored_on_hardware(const std::string& name, const std::string& argument) {
  return name == "aten::_fused_adamw_" && (argument == "grad_scale" || argument == "found_inf");
}

void run_on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto& name = schema.operator_name().name;
  const auto count = schema.arguments().size();
  const auto first = stack->size() - count;
  count_op(c10::toString(schema.operator_name()));
  if (reads_device(name, schema, at::ArrayRef<IValue>(*stack).slice(first))) count_host_sync(name);

  AliasedCall call;
  bool is_factory = false;
  for (size_t i = 0; i < count; i++) {
    auto& value = (*stack)[first + i];
    if (is_ignored_on_hardware(name, schema.arguments()[i].name())) {
      value = IValue();
    } else if (value.isTensor()) {
      value = call.argument(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> aliases;
      for (const at::Tensor& tensor : value.toTensorList()) aliases.push_back(call.argument(tensor));
      value = aliases;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> aliases;
      for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorList()) {
        aliases.push_back(tensor.has_value() ? std::make_optional(call.argument(*tensor)) : std::nullopt);
      }
      value = aliases;
    } else if (value.isDevice() && value.toDevice().type() == kNpu) {
      is_factory = true;
      call.set_device(index_or_current(value.toDevice()));
      value = c10::Device(c10::kCPU);
    }
  }
  TORCH_CHECK(
      !call.has_cpu_arguments() || !(call.has_device_arguments() || is_factory) || kIndexing.count(name) > 0,
      "Expected all tensors to be on the same device, but found at least two devices, npu:",
      static_cast<int>(call.device()), " and cpu! (in ", name, ")");

  for (size_t i = 0; i < count; i++) {  // after the tensors, which say on which device the call is
    auto& value = (*stack)[first + i];
    if (value.isGenerator()) {
      value = cpu_generator_of(value.toGenerator());
    } else if (value.isNone() && schema.arguments()[i].name() == "generator") {
      value = cpu_generator_of(default_generator(call.device()));
    }
  }

  op.callBoxed(stack);

  call.write_back();
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); i++) {
    auto& value = (*stack)[i];
    if (value.isTensor()) {
      value = call.result(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> results;
      for (const at::Tensor& tensor : value.toTensorList()) results.push_back(call.result(tensor));
      value = results;
    }
  }
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
}

}  // namespace
}  // namespace simulated_npu
