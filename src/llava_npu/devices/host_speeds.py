"""What operations take on this machine's CPU, measured once per machine and torch version, in a few seconds.

A single peak says little about a CPU: small products run at half of it, memory is quick or slow by how much is moved
and in which order, an exponential takes longer than the memory that it is read from. So curves are measured, of
primitive operations only: products over their three dimensions, streaming over sizes and layouts, fused attention over
lengths and head dimensions, a few functions, and the fixed cost of a call. Nothing is fitted to training steps.

Operands are in no cache when an operation begins, as in a training step, which writes far more than caches hold between
two uses of a tensor. (In caches, additions are three times as quick and small products a third.)
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from llava_npu.errors import UserError
from llava_npu.files.atomic import write_text
from llava_npu.files.cache import build_once, cache_root, digest_of

_POOL = 2**26  # bytes from which operands are taken, one after the other: more than caches hold
_LONG_ENOUGH = 1e-3  # seconds of a round
_LONG = 1e-2  # seconds for an operation of which one round is enough
_TOO_LONG = 0.15  # seconds for an operation: where products are emulated, the large ones are not tried
_DIMENSIONS = (24, 96, 352, 1280)  # of a product; no powers of two, whose rows collide in caches
_STREAMED = tuple(2**power for power in range(17, 27, 3))
_LENGTHS, _HEAD_DIMENSIONS = (32, 128, 512, 1536), (16, 32, 128)
_ELEMENTS = 2**18
_FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "exp": torch.exp,
    "tanh": torch.tanh,
    "softmax": lambda values: torch.softmax(values, -1),
    "norm": lambda values: functional.layer_norm(values, values.shape[-1:]),
}


@dataclass(frozen=True)
class SecondsTable:
    """Measured seconds over a grid; in between linear in logarithms, beyond its ends those of the ends.

    Attributes:
        axes: ascending values of each dimension.
        seconds: for all combinations, the last axis varying first.
    """

    axes: tuple[tuple[int, ...], ...]
    seconds: tuple[float, ...]

    def at(self, *point: float) -> float:
        values = np.log(np.array(self.seconds)).reshape([len(axis) for axis in self.axes])
        for axis, position in zip(self.axes, point, strict=True):  # each removes the first dimension that is left
            place = np.interp(math.log(position), np.log(axis), np.arange(len(axis)))
            lower = min(int(place), len(axis) - 1)
            upper = min(lower + 1, len(axis) - 1)
            values = values[lower] + (values[upper] - values[lower]) * (place - lower)
        return float(np.exp(values))


@dataclass(frozen=True)
class HostSpeeds:
    """What operations take on a CPU.

    Attributes:
        call: seconds of an operation, a view too, for all that is not computing: Python, autograd, dispatch.
        product: seconds of a FLOP, over rows, columns and the dimension that is summed over.
        streamed, strided: seconds of a byte, over how many are moved; written ones count twice, as a cache reads a line
            before it is changed. Of contiguous tensors, and of any others.
        functions: seconds of an element, by name.
        attention, causal, attention_backward, causal_backward: seconds of a query and a key (of causal attention also
            of those that it skips), over length and head dimension.
    """

    call: float
    product: SecondsTable
    streamed: SecondsTable
    strided: SecondsTable
    functions: dict[str, float]
    attention: SecondsTable
    causal: SecondsTable
    attention_backward: SecondsTable
    causal_backward: SecondsTable

    @classmethod
    def from_json(cls, text: str) -> HostSpeeds:
        values = json.loads(text)
        for name, value in values.items():
            if isinstance(value, dict) and "axes" in value:
                values[name] = SecondsTable(tuple(map(tuple, value["axes"])), tuple(value["seconds"]))
        return cls(**values)


def host_speeds(machine: str, dtype: torch.dtype) -> HostSpeeds:
    """Those of this machine, from the cache (`speeds/`) or measured.

    Args:
        machine: the CPU's name.
        dtype: that products are computed in.
    """
    known = digest_of("host speeds", machine, torch.get_num_threads(), str(dtype), torch.__version__)
    try:
        folder = build_once(cache_root() / "speeds" / known, lambda folder: _write(folder, dtype))
    except UserError:  # a cache that cannot be written is not needed
        return measure_host_speeds(dtype)
    return HostSpeeds.from_json((folder / "speeds.json").read_text())


def _write(folder: Path, dtype: torch.dtype) -> None:
    write_text(folder / "speeds.json", json.dumps(asdict(measure_host_speeds(dtype))))


def measure_host_speeds(dtype: torch.dtype) -> HostSpeeds:
    """Measures this machine's CPU.

    Args:
        dtype: that products are computed in.
    """
    memory = _Memory()
    with torch.no_grad():
        streamed, strided = (_streams(memory, permuted=permuted) for permuted in (False, True))
        attention = [_attention(memory, causal, back) for back in (False, True) for causal in (False, True)]
        functions = {
            name: _seconds(lambda: (memory.take(_ELEMENTS // 64, 64),), work) / _ELEMENTS
            for name, work in _FUNCTIONS.items()
        }
        product = _products(memory, dtype)
    return HostSpeeds(_seconds_of_a_call(), product, streamed, strided, functions, *attention)


class _Memory:
    """Tensors in turn from one that is larger than the caches."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        self._pool = torch.rand(_POOL // 4).to(dtype)
        self._next = 0

    def take(self, *shape: int) -> torch.Tensor:
        count = math.prod(shape)
        start = self._next if self._next + count <= self._pool.numel() else 0
        self._next = start + count
        return self._pool[start : start + count].view(shape)

    def of(self, dtype: torch.dtype) -> _Memory:
        return self if self._pool.dtype is dtype else _Memory(dtype)


def _products(memory: _Memory, dtype: torch.dtype) -> SecondsTable:
    """Of a linear layer's two orders in memory: as in the forward pass, and as for the gradients of weights."""
    sources, targets = memory.of(dtype), _Memory(dtype)
    found: dict[tuple[int, ...], float] = {}
    last = 0.0
    for m, n, k in sorted(itertools.product(_DIMENSIONS, repeat=3), key=math.prod):
        flops = 2 * m * n * k
        if flops * last <= _TOO_LONG:
            layouts = (
                lambda m=m, n=n, k=k: (sources.take(m, k), sources.take(n, k).T, targets.take(m, n)),
                lambda m=m, n=n, k=k: (sources.take(k, m).T, sources.take(k, n), targets.take(m, n)),
            )
            taken = [_seconds(each, lambda a, b, out: torch.mm(a, b, out=out)) for each in layouts]
            last = sum(taken) / len(taken) / flops
        found[m, n, k] = last
    return SecondsTable((_DIMENSIONS,) * 3, tuple(found[shape] for shape in itertools.product(_DIMENSIONS, repeat=3)))


def _streams(memory: _Memory, *, permuted: bool) -> SecondsTable:
    """Additions; permuted: copies between the orders (token, head) and (head, token)."""
    targets, seconds = _Memory(), []
    for size in _STREAMED:
        count = size // 4 // (3 if permuted else 4)  # a float is read once or twice, and written

        def operands(count: int = count) -> tuple[torch.Tensor, ...]:
            if permuted:
                tokens = count // 128
                return memory.take(tokens, 4, 32).transpose(0, 1), targets.take(4, tokens, 32)
            return memory.take(count), memory.take(count), targets.take(count)

        def work(*tensors: torch.Tensor) -> torch.Tensor:
            return tensors[1].copy_(tensors[0]) if permuted else torch.add(*tensors[:2], out=tensors[2])

        seconds.append(_seconds(operands, work) / size)
    return SecondsTable((_STREAMED,), tuple(seconds))


def _attention(memory: _Memory, causal: bool, backward: bool) -> SecondsTable:
    heads, seconds = 2, []
    for length, dimension in itertools.product(_LENGTHS, _HEAD_DIMENSIONS):

        def operands(length: int = length, dimension: int = dimension) -> tuple[torch.Tensor, ...]:
            shape = (1, length, heads, dimension)
            return tuple(memory.take(*shape).transpose(1, 2) for _ in range(3))

        def forward(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*tensors, 0.0, causal)

        def with_results(operands: Callable[[], tuple[torch.Tensor, ...]] = operands) -> tuple[torch.Tensor, ...]:
            tensors = operands()
            return (*tensors, *forward(*tensors))

        def back(*tensors: torch.Tensor) -> object:
            query, key, value, out, statistics = tensors
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                out, query, key, value, out, statistics, 0.0, causal
            )

        taken = _seconds(with_results, back) if backward else _seconds(operands, forward)
        seconds.append(taken / (heads * length * length))
    return SecondsTable((_LENGTHS, _HEAD_DIMENSIONS), tuple(seconds))


def _seconds(operands: Callable[[], tuple[torch.Tensor, ...]], work: Callable[..., object]) -> float:
    """Seconds of `work` on operands that are in no cache: the median of a few rounds of several.

    Not the quickest: a step consists of thousands of operations, and is not lucky with all of them.
    """
    work(*operands())  # maps memory, and makes what the library keeps for such an operation
    taken, rounds = [], 1
    for _ in range(4):
        prepared = [operands() for _ in range(rounds)]
        start = processor_seconds()
        for each in prepared:
            work(*each)
        taken.append((processor_seconds() - start) / rounds)
        if taken[0] > _LONG:
            break
        rounds = min(max(int(_LONG_ENOUGH / taken[0]), 1), 32)
    return statistics.median(taken)


def processor_seconds() -> float:
    """Seconds of the clock; of a single thread, those that it had the processor, whatever else runs there."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def _seconds_of_a_call() -> float:
    """From a network so small that it computes nothing to speak of."""
    layers = torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.SiLU()) for _ in range(16)))
    values = torch.ones(2, 8)

    def step() -> None:
        layers.zero_grad()
        layers(values).sum().backward()

    with _Counted() as counted:
        step()
    return _seconds(tuple, step) / counted.operations


class _Counted(TorchDispatchMode):
    """Counts operations, views too."""

    operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        return func(*args, **(kwargs or {}))
