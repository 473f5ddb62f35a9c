"""What every kind of device offers."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from llava_npu.devices.marks import HostMark, Mark
from llava_npu.devices.profiling import Profiler


@dataclass(frozen=True)
class Memory:
    """Bytes of one device: what it has in all, what is free, the most that was allocated so far."""

    total: int
    free: int
    peak: int


@dataclass(frozen=True)
class Variable:
    """An environment variable that a kind of device does better with, and why."""

    name: str
    value: str
    reason: str


class Device(ABC):
    """One process's device.

    Attributes:
        kind: "cpu", "cuda" or "npu".
        distributed_backend: torch.distributed's backend between such devices.
        visibility_variable: the environment variable that says which of them a process sees; None: it sees all.
        index: which one of several; 0 where there is one.
        optimizer_heeds_found_inf: whether torch's fused AdamW leaves everything as it is on this device where the
            optimizer's `found_inf` is not zero; if not, the host must not call it after a gradient that is not finite.
    """

    kind: ClassVar[str]
    distributed_backend: ClassVar[str]
    visibility_variable: ClassVar[str | None] = None
    optimizer_heeds_found_inf: ClassVar[bool] = True

    def __init__(self) -> None:
        self.index = 0

    @abstractmethod
    def is_available(self) -> bool:
        """Whether this machine has one that works. Never raises."""

    @abstractmethod
    def why_unavailable(self) -> str:
        """One sentence for a user who asked for it and cannot have it."""

    def has_software(self) -> bool:
        """Whether software is installed that is of use for this kind alone, working or not."""
        return self.is_available()

    def default_index(self) -> int:
        """The device of this process in a launch with one process per device (torchrun's LOCAL_RANK), else 0."""
        return int(os.environ.get("LOCAL_RANK", 0)) % max(self.count, 1)

    def use(self, index: int) -> None:
        """Makes device `index` the one that this process computes on."""
        self.index = index

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.kind, self.index)

    @property
    @abstractmethod
    def name(self) -> str:
        """The product's name, as in "NVIDIA H100 80GB HBM3"; says `simulated` if it is."""

    @property
    @abstractmethod
    def count(self) -> int:
        """How many there are."""

    @property
    @abstractmethod
    def autocast_dtype(self) -> torch.dtype | None:
        """The 16-bit type to compute in where that pays (bfloat16 if the device has it), or None: use fp32."""

    @abstractmethod
    def memory(self) -> Memory:
        """Memory of this device, in bytes."""

    @abstractmethod
    def reset_peak_memory(self) -> None:
        """Resets the peak of `memory()`."""

    @abstractmethod
    def synchronize(self) -> None:
        """Waits until all work given to the device is done."""

    @abstractmethod
    def empty_cache(self) -> None:
        """Gives memory that is kept but not used back to the system."""

    @abstractmethod
    def rng_state(self) -> torch.Tensor:
        """State of the device's own random generator."""

    @abstractmethod
    def set_rng_state(self, state: torch.Tensor) -> None:
        """Puts back what `rng_state` gave."""

    @abstractmethod
    def peak_tflops(self, dtype: torch.dtype) -> float:
        """Dense matrix TFLOP/s of one device for `dtype`: a published figure where known, else measured."""

    @property
    def quantized_bits(self) -> tuple[int, ...]:
        """Bits per weight that models can be held in here, by bitsandbytes."""
        return ()

    @property
    def quantization_hint(self) -> str:
        """How to get what `quantized_bits` lacks, or ""."""
        return ""

    @property
    def simulated(self) -> bool:
        """Whether this is the simulated device of the tests, whose speed and precision say nothing of hardware."""
        return False

    @property
    def compiles(self) -> bool:
        """Whether torch.compile makes code for it."""
        return True

    def stream(self) -> AbstractContextManager[object]:
        """A context in which work goes to a queue of its own, next to the device's default one."""
        return nullcontext()

    def mark(self) -> Mark:
        """A point behind all work that the device has been given so far."""
        return HostMark()

    @abstractmethod
    def profiler(self, folder: Path) -> Profiler:
        """A profiler of this process and device, which writes its trace into a folder."""

    def start_reading(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy on the host of a tensor on this device. It is right once a mark made from now on is reached."""
        if tensor.device.type == "cpu":
            return tensor.clone()
        return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)

    def environment(self) -> list[Variable]:
        """What to set before the first work on the device, for variables that the user has not set."""
        return []

    def visible_only(self, indices: Sequence[int]) -> dict[str, str]:
        """The environment of a process that is to see these devices alone, and counts them from 0."""
        if self.visibility_variable is None:
            return {}
        seen = os.environ.get(self.visibility_variable)
        names = seen.split(",") if seen else [str(index) for index in range(self.count)]
        return {self.visibility_variable: ",".join(names[index] for index in indices)}

    def use_exact_float32(self) -> list[str]:
        """Stops the device from rounding float32 matrix products and convolutions to 10 bits (TF32, HF32).

        Returns:
            What was changed, one setting each; nothing where float32 was exact already or the user has chosen.
        """
        return []

    def warnings(self) -> list[str]:
        """What is wrong with how this process uses the device, one sentence each, with the fix."""
        return []
