"""What an engine keeps on a device, as planning asks for it: bytes, from the number of elements of a model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class ModelSizes:
    """Elements of a model.

    Attributes:
        trained, frozen: elements that are trained, and that are not.
        largest_unit: of the largest layer that is gathered as one.
        rest: outside of all layers (embeddings, head, last norm).
        compute_bytes: bytes of an element of the type computed in.
    """

    trained: int
    frozen: int
    largest_unit: int
    rest: int
    compute_bytes: int


@dataclass(frozen=True)
class EngineMemory:
    """Bytes that an engine needs for one device.

    Attributes:
        weights, gradients, optimizer: kept from step to step, on the device or, as `Engine.on_host` says, on the host.
        passing: gathered layers and gradients being sent, at the worst moment of a forward or backward pass.
        passing_at_step: of these, what is still there during the optimizer's step.
    """

    weights: int
    gradients: int
    optimizer: int
    passing: int = 0
    passing_at_step: int = 0


def count_sizes(model: nn.Module, compute_bytes: int) -> ModelSizes:
    """Counts a model; the layers are those that transformers says must not be split, and the projector."""
    layers = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    projector = model.get_submodule("model.multi_modal_projector")
    units = [module for module in model.modules() if type(module).__name__ in layers or module is projector]
    in_units = {id(parameter) for unit in units for parameter in unit.parameters()}
    every = list(model.parameters())
    return ModelSizes(
        _elements(parameter for parameter in every if parameter.requires_grad),
        _elements(parameter for parameter in every if not parameter.requires_grad),
        max((_elements(unit.parameters()) for unit in units), default=0),
        _elements(parameter for parameter in every if id(parameter) not in in_units),
        compute_bytes,
    )


def _elements(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)
