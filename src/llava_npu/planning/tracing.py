"""What a training step holds in memory, from running it on tensors without numbers.

A fake tensor (torch's `FakeTensorMode`) has a shape, a type and a storage, but no memory. The model, its loss, autograd
run on them as they are, so that what each layer saves for the backward pass, and when it is freed, need not be
described anywhere: whoever adds a projector adds it to the plan. A step of 7 billion parameters takes two seconds.

Counted are tensors, to the byte. Not counted: scratch memory within an operator, what an allocator loses by rounding
and fragmentation, and what drivers and libraries take for themselves.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry
from torch.utils.hooks import RemovableHandle

_STAND_INS = ("empty_like", "new_empty", "empty")
KINDS = ("weights", "gradients", "optimizer", "copies", "activations", "logits", "buffers")


@dataclass(frozen=True)
class Held:
    """Bytes held at one moment, by what they are.

    Attributes:
        weights, gradients, optimizer: of the model, of what learns, AdamW's two moments.
        copies: trained weights, cast to the 16-bit type that products are computed in.
        activations: what the forward pass leaves for the backward pass, and passing values of either.
        logits: from the last hidden state to the loss: logits at supervised positions, and their gradients.
        buffers: the batch itself, fixed tables, masks.
    """

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    copies: int = 0
    activations: int = 0
    logits: int = 0
    buffers: int = 0

    @property
    def total(self) -> int:
        return sum(vars(self).values())


class TracedOperation(NamedTuple):
    """What an operation computes and moves.

    Attributes:
        kind: "matrix", "attention", "view" (which moves nothing) or "vector" (all others).
        flops: of products; of attention those of all pairs, causal or not. 0 for an Ascend's fused attention.
        read, written: bytes of inputs and outputs.
        name: of the operation in aten.
        shape: of products, rows, columns and the dimension that is summed over; of attention, length of queries, of
            keys, and head dimension; of others, the largest tensor's elements.
        strided: whether a tensor's elements do not lie one after the other.
        causal: of attention.
    """

    kind: str
    flops: int
    read: int
    written: int
    name: str = ""
    shape: tuple[int, ...] = (1, 1, 1)
    strided: bool = False
    causal: bool = False


@dataclass(frozen=True)
class StepTrace:
    """A training step's memory.

    Attributes:
        moments: the moments of forward and backward pass that could be its peak: for each amount of gradients that was
            held, the one with the most of everything else. Gradients grow while activations shrink; which moment is the
            peak depends on where gradients are kept.
        before_step: what is held when the optimizer's step begins.
        inputs: bytes of the micro-batch itself.
        operations: how often there is one like this.
    """

    moments: tuple[Held, ...]
    before_step: Held
    inputs: int
    operations: Mapping[TracedOperation, int] = field(default_factory=dict)


def between(first: StepTrace, rows: int, second: StepTrace, more_rows: int, wanted: int) -> StepTrace:
    """The trace of a micro-batch of `wanted` rows, from those of two other sizes: it is a line, as good as exactly."""
    by_gradients = {moment.gradients: moment for moment in second.moments}
    pairs = [(moment, by_gradients[moment.gradients]) for moment in first.moments if moment.gradients in by_gradients]

    def line(a: int, b: int) -> int:
        return max(0, a + (b - a) * (wanted - rows) // (more_rows - rows))

    moments = (Held(**{kind: line(getattr(a, kind), getattr(b, kind)) for kind in KINDS}) for a, b in pairs)
    inputs = line(first.inputs, second.inputs)
    return replace(first, moments=tuple(moments), inputs=inputs)


@dataclass
class _Storage:
    bytes: int
    kind: str
    reference: weakref.ref[Any]


@dataclass
class Tracer(TorchDispatchMode):
    """Follows every storage from where it is made to where it is freed."""

    held: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))

    def __post_init__(self) -> None:
        super().__init__()
        self._storages: dict[int, _Storage] = {}
        self._kind = "activations"
        self._most: dict[int, Held] = {}
        self._hooks: list[RemovableHandle] = []
        self.operations: Counter[TracedOperation] = Counter()

    def __hash__(self) -> int:
        return id(self)

    def hold(self, tensor: torch.Tensor, kind: str) -> None:
        """Counts a tensor's storage, new or known, as `kind`."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._storages.get(key)
        if known is None:
            known = _Storage(storage.nbytes(), kind, weakref.ref(storage, lambda _: self._free(key)))
            self._storages[key] = known
            self.held[kind] += known.bytes
            self._note()
        elif known.kind != kind:
            self.held[known.kind] -= known.bytes
            self.held[kind] += known.bytes
            known.kind = kind

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*error)

    def hold_model(self, model: nn.Module) -> None:
        """Counts weights and buffers; gradients as soon as they are a parameter's."""
        for parameter in model.parameters():
            self.hold(parameter, "weights")
            if parameter.requires_grad:
                self._hooks.append(parameter.register_post_accumulate_grad_hook(self._hold_gradient))
        for buffer in model.buffers():
            self.hold(buffer, "buffers")

    def count_as(self, kind: str) -> None:
        """Counts what is made from now on as `kind`."""
        self._kind = kind

    def take_moments(self) -> tuple[Held, ...]:
        """The candidates for a peak since the last call."""
        moments, self._most = tuple(self._most.values()), {}
        self._note()
        return moments

    def now(self) -> Held:
        return Held(**self.held)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._count_operation(func, args, kwargs or {}, out)
        kind = "copies" if func is torch.ops.aten._to_copy.default and self._is_weight(args[0]) else self._kind
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self._storages:
                self.hold(tensor, kind)
        return out

    def _count_operation(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        packet = func._overloadpacket
        made = [each for each in tree_iter(out) if isinstance(each, torch.Tensor)]
        written = sum(each.nbytes for each in made)
        if not written:
            return
        if func.is_view or packet is torch.ops.aten._unsafe_view:
            self.operations[TracedOperation("view", 0, 0, 0)] += 1
            return
        if packet.__name__ in _STAND_INS:  # in the place of an operator that reads about as much as it gives
            self.operations[TracedOperation("vector", 0, written, written)] += 1
            return
        inputs = [each for each in tree_iter((args, kwargs)) if isinstance(each, torch.Tensor)]
        read, name = sum(map(_bytes, inputs)), packet.__name__
        if "attention" in name:
            causal = any(each is True for each in tree_iter((args, kwargs)))
            self.operations[_attention(inputs, read, written, name)._replace(causal=causal)] += 1
            return
        product = getattr(torch.ops.aten, name.removesuffix("_"), packet)  # in place or not
        flops = flop_registry[product](*args, **kwargs, out_val=out) if product in flop_registry else 0
        if flops:
            operation = TracedOperation("matrix", flops, read, written, name, _product(inputs, made, flops))
        else:
            largest = max(each.numel() for each in (*inputs, *made))
            strided = not all(each.is_contiguous() for each in (*inputs, *made))
            operation = TracedOperation("vector", 0, read, written, name, (largest,), strided)
        self.operations[operation] += 1

    def _hold_gradient(self, parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            self.hold(parameter.grad, "gradients")

    def _is_weight(self, tensor: torch.Tensor) -> bool:
        known = self._storages.get(tensor.untyped_storage()._cdata)
        return known is not None and known.kind == "weights"

    def _free(self, key: int) -> None:
        storage = self._storages.pop(key)
        self.held[storage.kind] -= storage.bytes

    def _note(self) -> None:
        now = self.now()
        most = self._most.get(now.gradients)
        if most is None or now.total > most.total:
            self._most[now.gradients] = now


def _bytes(tensor: torch.Tensor) -> int:
    """What is read of it: where it is expanded, each element once."""
    strides = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(size for size, stride in strides if stride) * tensor.itemsize if tensor.numel() else 0


def _product(inputs: list[torch.Tensor], made: list[torch.Tensor], flops: int) -> tuple[int, ...]:
    """Rows, columns and the dimension that is summed over of one of a batch; of a convolution, as of a product of
    patches.
    """
    columns = made[0].shape[1 if made[0].ndim == 4 else -1]
    batch = made[0].shape[:-2].numel() if made[0].ndim == 3 else 1
    rows = made[0].numel() // columns // batch
    return rows, columns, max(1, flops // (2 * rows * columns * batch))


def _attention(inputs: list[torch.Tensor], read: int, written: int, name: str) -> TracedOperation:
    """torch's fused attention: two products forward; five backward, one of them computed again."""
    backward = "backward" in name
    query, key = inputs[1:3] if backward else inputs[:2]  # (batch, heads, length, head_dim), after the gradient
    shape = (query.shape[-2], key.shape[-2], query.shape[-1])
    flops = (10 if backward else 4) * query.shape[:-2].numel() * math.prod(shape)
    return TracedOperation("attention", flops, read, written, name, shape)
