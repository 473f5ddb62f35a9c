"""Every process holds the whole model; gradients are averaged between them (PyTorch's DistributedDataParallel)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

from llava_npu.training.engines.base import Engine
from llava_npu.training.objective import SupervisedLoss


class DdpEngine(Engine):
    """Also the engine of a single process, which then trains the bare model."""

    shards_weights = False
    skips_nonfinite = True

    def prepare(self, objective: SupervisedLoss, make_optimizer: Callable[[], torch.optim.Optimizer]) -> None:
        objective.to(self.accelerator.device)
        self._model = objective.model
        self.optimizer = make_optimizer()
        self._trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self.objective = self.accelerator.prepare_model(objective)

    @contextmanager
    def micro_step(self, last: bool) -> Iterator[None]:
        device_type, dtype = self.accelerator.device.type, self.compute_dtype
        with (
            nullcontext() if last else self.accelerator.no_sync(self.objective),
            torch.autocast(device_type, dtype=dtype, enabled=dtype is not None),
        ):
            yield

    def backward(self, part: torch.Tensor) -> None:
        # Gradients are averaged over processes: times their number makes that the sum.
        self.accelerator.backward(part * self.accelerator.num_processes)

    def step(self, max_grad_norm: float) -> torch.Tensor:
        norm = nn.utils.clip_grad_norm_(self._trained, max_grad_norm or float("inf"))
        self._skip_unless_finite(norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm
