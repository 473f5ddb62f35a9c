"""Every process holds the whole model; gradients are averaged between them (PyTorch's DistributedDataParallel)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from llava_npu.training.engines.base import Engine
from llava_npu.training.engines.memory import EngineMemory, ModelSizes
from llava_npu.training.engines.registry import register
from llava_npu.training.loss import SupervisedLoss
from llava_npu.training.parts import kept_types, place_weights


@register("ddp")
class DdpEngine(Engine):
    """Also the engine of a single process, which then trains the bare model."""

    keeps_whole_layers = True
    shards_weights = False

    @classmethod
    def memory(cls, options: Any, model: ModelSizes, devices: int) -> EngineMemory:
        """Everything on every device, and between several of them buckets, which double the gradients.

        Without `gradient_as_bucket_view` buckets are copies, and stay until the next step.
        """
        buckets = 4 * model.trained if devices > 1 else 0
        weights = 4 * model.trained + model.compute_bytes * model.frozen
        return EngineMemory(weights, 4 * model.trained, 8 * model.trained, buckets, passing_at_step=buckets)

    def prepare(self, objective: SupervisedLoss, make_optimizer: Callable[[], torch.optim.Optimizer]) -> None:
        place_weights(objective, self.accelerator.device, kept_types(objective, self.compute_dtype))
        self._model = objective.model
        self.optimizer = make_optimizer()
        # Frozen weights are not sent to other processes, which have read the same files: one that is written to would
        # no longer be shared between them.
        frozen = [name for name, parameter in objective.named_parameters() if not parameter.requires_grad]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(objective, frozen)
        # Placed already; on a CPU accelerate would copy all to "cpu:0".
        self.objective = self.accelerator.prepare_model(objective, device_placement=False)

    def micro_step(self, last: bool) -> AbstractContextManager[object]:
        context: AbstractContextManager[object] = self.accelerator.no_sync(self.objective)
        return nullcontext() if last else context

    def backward(self, part: torch.Tensor) -> None:
        # Gradients are averaged over processes: times their number makes that the sum.
        self.accelerator.backward(part * self.accelerator.num_processes)

    def step(self, max_grad_norm: float) -> torch.Tensor:
        return self._clip_and_step(max_grad_norm)
