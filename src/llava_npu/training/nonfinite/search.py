"""Where in a model, and in which samples, numbers stop being finite.

Nothing here runs while all is well. After a step whose gradient was not finite, it is computed once more with a check
behind every module.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import nn

from llava_npu.training.batches import MicroBatch
from llava_npu.training.parts import trained_parameters

LOSS = "lm_head and loss"  # computed in one, outside of any module


@dataclass(frozen=True)
class NonFinite:
    """The first tensor that holds a NaN or an infinity.

    Attributes:
        module: the module's name in the model.
        what: "weights" of the module, its "output", the "gradient" that comes back to its output, or the gradient of
            its "parameters".
        samples: names of the samples in which; all of the micro-batch where that cannot be told.
    """

    module: str
    what: str
    samples: tuple[str, ...]


class Passes(Protocol):
    """How a forward and backward pass is made: an engine, or a bare model."""

    def loss(self, batch: Mapping[str, Any], sequence_lengths: tuple[int, ...]) -> torch.Tensor: ...

    def micro_step(self, last: bool) -> AbstractContextManager[object]: ...

    def backward(self, part: torch.Tensor) -> None: ...


def find_nonfinite(
    passes: Passes, model: nn.Module, micro_batches: Sequence[MicroBatch], supervised_tokens: int, device: torch.device
) -> NonFinite | None:
    """Computes a step once more, until the first tensor that is not finite; None: all of them are.

    Every process of a run must call it. The gradients that it leaves are to be forgotten.

    Args:
        model: whose loss it is.
        supervised_tokens: of the whole step.
    """
    found: list[NonFinite] = []
    for micro_batch in micro_batches:
        here: list[NonFinite] = []
        with _checks(model, micro_batch, here), passes.micro_step(last=False):
            loss = passes.loss(micro_batch.to(device), micro_batch.sequence_lengths) / supervised_tokens
            if not here and not _is_finite(loss.detach()):
                here.append(NonFinite(LOSS, "output", micro_batch.names))
            passes.backward(loss)
        if not here and (name := _bad_gradient(model)) is not None:
            here.append(NonFinite(name, "parameters", micro_batch.names))
        found += here[:1]
    return found[0] if found else None


@contextmanager
def _checks(model: nn.Module, micro_batch: MicroBatch, found: list[NonFinite]) -> Iterator[None]:
    """Looks at every module's weights and output, and at the gradient that comes back to it, until one is found."""
    handles = []

    def behind(name: str, module: nn.Module, output: Any) -> None:
        for tensor in _tensors(output):
            if found:
                return
            if not _is_finite(tensor.detach()):
                weights = all(_is_finite(each.detach()) for each in module.parameters(recurse=False))
                what = "output" if weights else "weights"
                found.append(NonFinite(name, what, _samples(tensor.detach(), micro_batch)))
            elif tensor.requires_grad:
                handles.append(tensor.register_hook(lambda gradient, name=name: returning(name, gradient)))

    def returning(name: str, gradient: torch.Tensor) -> None:
        if not found and not _is_finite(gradient):
            found.append(NonFinite(name, "gradient", _samples(gradient, micro_batch)))

    for name, module in model.named_modules():
        if name:
            handles.append(
                module.register_forward_hook(lambda module, _, output, name=name: behind(name, module, output))
            )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from _tensors(value)


def _is_finite(tensor: torch.Tensor) -> bool:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return not local.is_floating_point() or bool(local.isfinite().all())


def _bad_gradient(model: nn.Module) -> str | None:
    for name, parameter in trained_parameters(model):
        if parameter.grad is not None and not _is_finite(parameter.grad):
            return name
    return None


def _samples(tensor: torch.Tensor, micro_batch: MicroBatch) -> tuple[str, ...]:
    """Names of the samples in whose positions a tensor (rows, length, …) is not finite."""
    lengths, names = micro_batch.sequence_lengths, micro_batch.names
    rows = micro_batch.tensors["input_ids"].shape
    if tuple(tensor.shape[:2]) != tuple(rows) or micro_batch.parts > 1:
        return names
    positions = (~tensor.isfinite()).flatten(2).any(-1).flatten().nonzero().flatten().tolist()
    ends = list(accumulate(lengths))
    sequences = {next(number for number, end in enumerate(ends) if position < end) for position in positions}
    # Padding is a sequence too: one behind each sample, or one behind all that are packed into a row.
    padded = rows[0] > 1 or len(names) == 1
    samples = sorted({number // 2 if padded else number for number in sequences})
    return tuple(names[number] for number in samples if number < len(names)) or names
