"""What every engine does, and the parts that do not depend on how weights are kept."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from torch import nn

from llava_npu.config.section import Section
from llava_npu.models.projectors import Projector
from llava_npu.training.checkpointing.state import SavedState, moment_key, scale_key, weight_key
from llava_npu.training.engines.memory import EngineMemory, ModelSizes
from llava_npu.training.loss import SupervisedLoss
from llava_npu.training.optimizer import clip_and_step
from llava_npu.training.parts import is_batch_norm, trained_parameters


class NoOptions(Section):
    """An engine without options."""


class Engine(ABC):
    """Trains one model in all processes of a run. Every method is called by all of them, in the same order.

    Class attributes:
        name: as in `engine: NAME`; set by `register`.
        options_class: the keys of `engine_options`.
        alternatives: sets of options that a plan compares.
        keeps_whole_layers: whether layers stay as they are, so that they may be compiled, or in 4 or 8 bits. Other
            engines gather a layer's weights in the type computed in, and need a process group even of one process.

    Attributes:
        shards_weights: whether a process holds only a part of the weights. All processes must then run the same
            modules, whatever their batches hold.
        objective: the module whose forward pass gives the summed loss, once `prepare` has run.
        optimizer: whose groups carry the learning rates.
        scaler: multiplies what goes to `backward` in a training step, where float16 would lose small gradients; does
            nothing in other types. `step` divides again.
    """

    name: ClassVar[str]
    options_class: ClassVar[type[Section]] = NoOptions
    alternatives: ClassVar[tuple[dict[str, Any], ...]] = ({},)
    keeps_whole_layers: ClassVar[bool] = False
    shards_weights: bool
    objective: nn.Module
    optimizer: torch.optim.Optimizer
    _model: nn.Module  # inside the objective

    def __init__(
        self, accelerator: Accelerator, compute_dtype: torch.dtype | None, options: Section, max_grad_norm: float
    ):
        """Args: `options` is an `options_class`; `max_grad_norm` is what every `step` will get."""
        self.accelerator = accelerator
        self.compute_dtype = compute_dtype
        self._options: Any = options
        self._max_grad_norm = max_grad_norm
        self.scaler = torch.amp.GradScaler(accelerator.device.type, enabled=compute_dtype is torch.float16)

    @classmethod
    @abstractmethod
    def memory(cls, options: Any, model: ModelSizes, devices: int) -> EngineMemory:
        """What the engine keeps for one of `devices` devices, wherever it is kept."""

    @classmethod
    def on_host(cls, options: Any) -> frozenset[str]:
        """Which of "weights", "gradients" and "optimizer" are kept in the host's memory."""
        return frozenset()

    @abstractmethod
    def prepare(self, objective: SupervisedLoss, make_optimizer: Callable[[], torch.optim.Optimizer]) -> None:
        """Puts a model, until now whole, on the CPU and perhaps mapped from files, on the devices.

        Weights may be of other types than `parts.kept_types` says: they are converted here, one after the other, so
        that no process holds the whole model in memory of its own that its device does not hold.

        Args:
            objective: the model inside a module whose forward pass gives its loss.
            make_optimizer: builds the optimizer over what the model's trained parameters are by then.
        """

    def loss(self, batch: Mapping[str, Any], sequence_lengths: tuple[int, ...]) -> torch.Tensor:
        """The summed loss of a batch, as `SupervisedLoss` has it; products are computed in `compute_dtype`."""
        dtype = self.compute_dtype
        # The forward pass alone: a backward pass takes each product's type from it.
        with torch.autocast(self.accelerator.device.type, dtype=dtype, enabled=dtype is not None):
            loss: torch.Tensor = self.objective(batch, sequence_lengths)
        return loss

    @abstractmethod
    def micro_step(self, last: bool) -> AbstractContextManager[object]:
        """The context of one forward and backward pass; `last` is the step's last one, before `step`."""

    @abstractmethod
    def backward(self, part: torch.Tensor) -> None:
        """Adds the gradients of a part of the step's loss; over passes and processes the parts add up."""

    @abstractmethod
    def step(self, max_grad_norm: float) -> torch.Tensor:
        """Moves the weights by what has been accumulated, and forgets it.

        Args:
            max_grad_norm: gradients are scaled down to this norm; 0 leaves them alone.

        Returns:
            The norm of the whole gradient, before scaling. Where it is not finite, nothing has moved.
        """

    def forget_gradients(self) -> None:
        """Drops what passes have accumulated since the last step."""
        self.optimizer.zero_grad(set_to_none=True)

    @property
    def model(self) -> nn.Module:
        """What is trained, inside the objective."""
        return self._model

    def _clip_and_step(self, max_grad_norm: float) -> torch.Tensor:
        """`step` of torch's optimizer, which moves nothing where the gradient is not finite."""
        self.scaler.unscale_(self.optimizer)
        norm = clip_and_step(self.optimizer, max_grad_norm)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, weight) of everything that is trained: whole, float32 where it is kept so, on the main process's host.

        Lazily, one after the other. Other processes take part, and get empty tensors.
        """
        for name, parameter in trained_parameters(self._model):
            yield name, self._whole(parameter.detach())

    def trained_shapes(self) -> dict[str, torch.Size]:
        """The shape of each trained weight as a whole, by name, once `prepare` has run."""
        return {name: parameter.shape for name, parameter in trained_parameters(self._model)}

    def state(self) -> dict[str, torch.Tensor]:
        """This process's part of the run's state, by the names of `checkpointing.state`: weights, moments, loss scale.

        A `DTensor` where there is a part in each process. A tensor that several processes give is the same in all of
        them. None are copies, so they are to be written before the next step.
        """
        tensors: dict[str, torch.Tensor] = {}
        for name, parameter in trained_parameters(self._model):
            tensors[weight_key(name)] = parameter.detach()
            for key, value in self.optimizer.state[parameter].items():
                tensors[moment_key(name, key)] = value
        for key, value in self.scaler.state_dict().items():  # nothing where it does nothing
            tensors[scale_key(key)] = torch.tensor(value)
        return tensors

    def load_state(self, saved: SavedState) -> None:
        """Puts back what `state` gave, of any engine in any number of processes, once `prepare` has run."""
        groups = self.optimizer.param_groups
        index = {id(each): number for number, each in enumerate(p for group in groups for p in group["params"])}
        packed = self.optimizer.state_dict()
        targets: dict[str, torch.Tensor] = {}
        for name, parameter in trained_parameters(self._model):
            moments = {
                key: torch.zeros(()) if key == "step" else torch.empty_like(parameter, requires_grad=False)
                for key in saved.moments(name)
            }
            targets |= {moment_key(name, key): moment for key, moment in moments.items()}
            targets[weight_key(name)] = parameter.detach()
            packed["state"][index[id(parameter)]] = moments
        saved.read(targets)
        self.optimizer.load_state_dict(packed)
        keys = self.scaler.state_dict().keys()
        if all(scale_key(key) in saved.shapes for key in keys):  # not where the run began in another type
            self.scaler.load_state_dict({key: saved.whole(scale_key(key)).item() for key in keys})

    def _whole(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor of which each process may hold a part: a copy on the host of the main process."""
        return tensor.cpu().clone() if self.accelerator.is_main_process else torch.empty(0)


def sharding_units(objective: nn.Module) -> list[nn.Module]:
    """What is gathered at once: a transformer layer, the projector; and batch normalisation, which stays float32.

    Inner modules come before outer ones.
    """
    layers = {name for module in objective.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    found = [
        module for module in objective.modules() if isinstance(module, Projector) or type(module).__name__ in layers
    ]
    outermost: list[nn.Module] = []
    seen: set[int] = set()
    for module in found:  # parents come first
        if id(module) not in seen and any(True for _ in module.parameters()):
            outermost.append(module)
        seen.update(id(inner) for inner in module.modules())
    return [*(module for module in objective.modules() if is_batch_norm(module)), *outermost]
