#include "process_group.h"

#include "alias.h"

#include <torch/version.h>

namespace simulated_npu {
namespace {

using at::Tensor;
using Tensors = std::vector<Tensor>;
using TensorLists = std::vector<Tensors>;
using Work = c10::intrusive_ptr<c10d::Work>;

// Collectives may finish after the call returns, so the aliases must keep the device memory alive.
Tensor on_host(const Tensor& tensor) {
  TORCH_CHECK(is_npu(tensor), "hccl moves NPU tensors, got one on ", tensor.device());
  TORCH_CHECK(tensor.is_non_overlapping_and_dense(), "hccl needs dense, non-overlapping tensors");
  return owning_cpu_alias(tensor);
}

Tensors on_host(const Tensors& tensors) {
  Tensors aliases;
  for (const auto& tensor : tensors) aliases.push_back(on_host(tensor));
  return aliases;
}

TensorLists on_host(const TensorLists& lists) {
  TensorLists aliases;
  for (const auto& list : lists) aliases.push_back(on_host(list));
  return aliases;
}

class Hccl final : public c10d::Backend {
 public:
  explicit Hccl(c10::intrusive_ptr<c10d::Backend> carrier)
      : Backend(carrier->getRank(), carrier->getSize()), carrier_(std::move(carrier)) {}

  const std::string getBackendName() const override {
    return "hccl";
  }
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 13  // torch 2.7 has no such method
  void setTimeout(std::chrono::milliseconds timeout) override {
    carrier_->setTimeout(timeout);
  }
#endif

  // Collectives over one set of tensors, and over an output and an input set: the carrier runs them on the aliases.
#define IN_PLACE(name, Options)                                       \
  Work name(Tensors& tensors, const c10d::Options& options) override { \
    auto aliases = on_host(tensors);                                    \
    return carrier_->name(aliases, options);                          \
  }
#define OUT_OF_PLACE(name, Output, Input, Options)                                \
  Work name(Output& output, Input& input, const c10d::Options& options) override { \
    auto outputs = on_host(output);                                                 \
    auto inputs = on_host(input);                                                   \
    return carrier_->name(outputs, inputs, options);                              \
  }
  IN_PLACE(broadcast, BroadcastOptions)
  IN_PLACE(allreduce, AllreduceOptions)
  IN_PLACE(allreduce_coalesced, AllreduceCoalescedOptions)
  IN_PLACE(reduce, ReduceOptions)
  OUT_OF_PLACE(allgather, TensorLists, Tensors, AllgatherOptions)
  OUT_OF_PLACE(_allgather_base, Tensor, Tensor, AllgatherOptions)
  OUT_OF_PLACE(allgather_into_tensor_coalesced, Tensors, Tensors, AllgatherOptions)
  OUT_OF_PLACE(gather, TensorLists, Tensors, GatherOptions)
  OUT_OF_PLACE(scatter, Tensors, TensorLists, ScatterOptions)
  OUT_OF_PLACE(reduce_scatter, Tensors, TensorLists, ReduceScatterOptions)
  OUT_OF_PLACE(_reduce_scatter_base, Tensor, Tensor, ReduceScatterOptions)
  OUT_OF_PLACE(reduce_scatter_tensor_coalesced, Tensors, Tensors, ReduceScatterOptions)
  OUT_OF_PLACE(alltoall, Tensors, Tensors, AllToAllOptions)
#undef IN_PLACE
#undef OUT_OF_PLACE

  Work alltoall_base(
      Tensor& output, Tensor& input, std::vector<int64_t>& output_splits, std::vector<int64_t>& input_splits,
      const c10d::AllToAllOptions& options) override {
    auto outputs = on_host(output);
    auto inputs = on_host(input);
    return carrier_->alltoall_base(outputs, inputs, output_splits, input_splits, options);
  }
  Work send(Tensors& tensors, int to, int tag) override {
    auto aliases = on_host(tensors);
    return carrier_->send(aliases, to, tag);
  }
  Work recv(Tensors& tensors, int from, int tag) override {
    auto aliases = on_host(tensors);
    return carrier_->recv(aliases, from, tag);
  }
  Work barrier(const c10d::BarrierOptions& options) override {
    return carrier_->barrier(options);
  }

 private:
  c10::intrusive_ptr<c10d::Backend> carrier_;
};

}  // namespace

c10::intrusive_ptr<c10d::Backend> make_hccl(c10::intrusive_ptr<c10d::Backend> carrier) {
  return c10::make_intrusive<Hccl>(std::move(carrier));
}

}  // namespace simulated_npu
