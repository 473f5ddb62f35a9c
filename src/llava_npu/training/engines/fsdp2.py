"""Weights, gradients and optimizer state in shards, one per process (PyTorch's fully_shard, known as FSDP2).

Built on torch's own function: accelerate's wrapper for it leaves out CPUs, on which this project is tested.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate import Accelerator
from pydantic import Field
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from llava_npu.config.section import Section
from llava_npu.errors import UserError
from llava_npu.training.engines.base import Engine, sharding_units
from llava_npu.training.engines.memory import EngineMemory, ModelSizes
from llava_npu.training.engines.registry import register
from llava_npu.training.loss import SupervisedLoss
from llava_npu.training.parts import is_batch_norm, kept_types


class Fsdp2Options(Section):
    """Options of `engine: fsdp2`."""

    shard_group: int | None = Field(
        None,
        ge=1,
        description="Number of devices that hold one copy of the weights together; null: all. The number of devices of "
        "one node is hybrid sharding: weights are gathered within a node, and only gradients are sent between nodes.",
    )
    reshard_after_forward: bool = Field(
        True,
        description="Free a layer's gathered weights after the forward pass and gather them again for the backward "
        "pass: less memory, 50 % more communication.",
    )
    offload: bool = Field(
        False, description="Keep shards, gradients and optimizer state in the host's memory, and step there."
    )


@register("fsdp2")
class Fsdp2Engine(Engine):
    """Shards the layers of tower and language model one by one, the projector as one, and the rest together."""

    options_class = Fsdp2Options
    alternatives = ({}, {"offload": True})
    shards_weights = True

    def __init__(
        self, accelerator: Accelerator, compute_dtype: torch.dtype | None, options: Fsdp2Options, max_grad_norm: float
    ):
        super().__init__(accelerator, compute_dtype, options, max_grad_norm)
        if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
            raise UserError(f"engine: fsdp2 needs torch 2.8 or newer; this is {torch.__version__}. Use ddp, or zero3.")

    @classmethod
    def memory(cls, options: Fsdp2Options, model: ModelSizes, devices: int) -> EngineMemory:
        """A shard of everything; the peak is the shards and the largest unit.

        Source: Zhao et al. 2023, PyTorch FSDP (arXiv:2304.11277), section 3.2.
        """
        trained, c, unit = model.trained, model.compute_bytes, model.largest_unit
        shards = options.shard_group or devices
        weights, gradients, optimizer = (
            -(-part // shards) for part in (4 * trained + c * model.frozen, 4 * trained, 8 * trained)
        )
        # A layer, the next one as it arrives (as sent, and as weights); its gradients, and those as they are sent.
        passing = c * (model.rest + 3 * unit) + ((c + 4) * unit if trained else 0)
        return EngineMemory(weights, gradients, optimizer, passing)

    @classmethod
    def on_host(cls, options: Fsdp2Options) -> frozenset[str]:
        return frozenset({"weights", "gradients", "optimizer"} if options.offload else ())

    def prepare(self, objective: SupervisedLoss, make_optimizer: Callable[[], torch.optim.Optimizer]) -> None:
        mesh = _mesh(self.accelerator.device.type, self.accelerator.num_processes, self._options.shard_group)
        precision = MixedPrecisionPolicy(
            param_dtype=self.compute_dtype,
            reduce_dtype=torch.float32 if self.compute_dtype else None,
            cast_forward_inputs=False,  # autocast does it where it is needed
        )
        offload = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu") if self._options.offload else OffloadPolicy()
        # True, and harmless: nothing changes a projector's output in place.
        warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module \(FSDP\w*Projector\) returned a view")
        whole = _without_numbers(objective, kept_types(objective, self.compute_dtype))
        for module in [*sharding_units(objective), objective]:
            fully_shard(
                module,
                mesh=mesh,
                mp_policy=MixedPrecisionPolicy() if is_batch_norm(module) else precision,
                offload_policy=offload,
                reshard_after_forward=self._options.reshard_after_forward if module is not objective else False,
            )
        for module in objective.modules():
            if isinstance(module, FSDPModule):
                # Sums, not averages: HCCL is not known to have the latter, and the loss is divided already.
                module.set_force_sum_reduction_for_comms(True)
                module.set_gradient_divide_factor(1.0)
        _fill_shards(objective, whole, torch.device("cpu") if self._options.offload else self.accelerator.device)
        for name, buffer in objective.named_buffers():
            owner, _, own_name = name.rpartition(".")
            objective.get_submodule(owner)._buffers[own_name] = buffer.to(self.accelerator.device)
        self.objective, self._model = objective, objective.model
        self.optimizer = make_optimizer()

    def micro_step(self, last: bool) -> AbstractContextManager[object]:
        return nullcontext()  # gradients are reduced in every pass: not to hold them whole is what sharding is for

    def backward(self, part: torch.Tensor) -> None:
        part.backward()

    def step(self, max_grad_norm: float) -> torch.Tensor:
        return self._clip_and_step(max_grad_norm)

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        self._reshard()
        return super().weights()

    def state(self) -> dict[str, torch.Tensor]:
        self._reshard()
        return super().state()

    def _reshard(self) -> None:
        """After a validation some weights are whole still, in one process perhaps, and in another shards again."""
        for module in self.objective.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _whole(self, tensor: torch.Tensor) -> torch.Tensor:
        return super()._whole(tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)


def _mesh(device_type: str, num_processes: int, shard_group: int | None) -> DeviceMesh:
    """One dimension: all hold one copy; two: copies between groups, shards within."""
    if shard_group is None or shard_group == num_processes:
        return init_device_mesh(device_type, (num_processes,))
    if num_processes % shard_group:
        raise UserError(
            f"fsdp2.shard_group: {shard_group} does not divide the number of processes, {num_processes}. Give the "
            "number of devices of one node, or null for one group of all."
        )
    shape = (num_processes // shard_group, shard_group)
    return init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard"))


def _without_numbers(objective: nn.Module, types: Mapping[int, torch.dtype]) -> dict[str, torch.Tensor]:
    """Puts every parameter on the meta device, in the type that it will have; returns the weights as they were."""
    whole = {name: parameter.detach() for name, parameter in objective.named_parameters()}
    _replace_parameters(
        objective, lambda old: torch.empty_like(old, dtype=types[id(old)], device="meta", requires_grad=False)
    )
    return whole


def _fill_shards(objective: nn.Module, whole: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Gives sharded parameters their numbers: of each weight this process reads its own part only."""
    parts = {id(parameter): whole[name] for name, parameter in objective.named_parameters()}
    _replace_parameters(objective, lambda old: _shard(parts[id(old)], old, device))
    objective._apply(lambda tensor: tensor)  # `fully_shard` looks at its parameters again


def _replace_parameters(module: nn.Module, make: Callable[[nn.Parameter], torch.Tensor]) -> None:
    """Puts other parameters in the place of a module's; shared ones stay shared."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for each in module.modules():
        for name, old in each._parameters.items():
            if old is not None:
                if old not in made:
                    made[old] = nn.Parameter(make(old), requires_grad=old.requires_grad)
                each._parameters[name] = made[old]


def _shard(whole: torch.Tensor, parameter: torch.Tensor, device: torch.device) -> DTensor:
    """This process's part of a whole tensor, copied to `device`, in the type and the form of `parameter`."""
    assert isinstance(parameter, DTensor)
    mesh, last = parameter.device_mesh, parameter.device_mesh.ndim - 1  # copies, if there are, are the dimension before
    parts = whole.chunk(mesh.size(last))
    rank = mesh.get_local_rank(last)
    part = parts[rank] if rank < len(parts) else whole[:0]
    shard = torch.empty_like(parameter, device=device, requires_grad=False)
    assert isinstance(shard, DTensor)
    shard.to_local().copy_(part)
    return shard
