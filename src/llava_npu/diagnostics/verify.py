"""`llava-npu verify`: does this device compute what the CPU computes?"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from llava_npu.devices import Device
from llava_npu.diagnostics.comparison import Comparison, short
from llava_npu.diagnostics.machine import installed
from llava_npu.diagnostics.models import compare_model
from llava_npu.diagnostics.operations import compare_operations, operations
from llava_npu.diagnostics.optimizer_steps import compare_optimizer
from llava_npu.diagnostics.real_sizes import real_sizes
from llava_npu.diagnostics.tiny_models import tiny_models
from llava_npu.version import __version__

_PACKAGES = ("torch", "torch-npu", "transformers", "accelerate", "numpy")


@dataclass(frozen=True)
class Verification:
    """All comparisons, and on what they were made.

    Attributes:
        device: torch's name of the device.
        name: the product's; says `simulated` if it is.
        settings: what was switched for the comparison, as in HF32 off.
        versions: of what computed.
        seconds: how long it took.
    """

    device: str
    name: str
    simulated: bool
    settings: tuple[str, ...]
    versions: dict[str, str]
    seconds: float
    comparisons: tuple[Comparison, ...]

    @property
    def failures(self) -> list[Comparison]:
        return [comparison for comparison in self.comparisons if not comparison.passed]

    @property
    def passed(self) -> bool:
        return bool(self.comparisons) and not self.failures


def verify(device: Device, progress: Callable[[str], None], quick: bool = False) -> Verification:
    """Compares `device` with the CPU: operations and the optimizer against float64, small models against float32.

    Args:
        progress: called with a line before each part.
        quick: whether the operations at real sizes are compared in 16 bits alone.
    """
    start = time.perf_counter()
    settings = device.use_exact_float32()
    half = device.autocast_dtype or torch.bfloat16
    comparisons: list[Comparison] = []
    for dtype in (torch.float32, half):
        progress(f"operations in {short(dtype)} on {device.name}")
        comparisons += compare_operations(operations(), device.torch_device, dtype)
    for dtype in (half,) if quick else (torch.float32, half):
        progress(f"operations at real sizes in {short(dtype)}")
        comparisons += compare_operations(real_sizes(), device.torch_device, dtype)
    progress("optimizer")
    comparisons += compare_optimizer(device.torch_device)
    for tiny in tiny_models():
        progress(f"{tiny.name}: forward, gradients, training steps")
        comparisons += compare_model(tiny, device.torch_device, [torch.float32, half])
    device.synchronize()
    return Verification(
        device=str(device.torch_device),
        name=device.name,
        simulated=device.simulated,
        settings=tuple(settings),
        versions={"llava-npu": __version__, "python": platform.python_version(), **installed(_PACKAGES)},
        seconds=time.perf_counter() - start,
        comparisons=tuple(comparisons),
    )
