"""A stand-in for torch_npu on machines without an Ascend device: test equipment, never part of an installed product.

Importing it makes torch's device type "npu" work: its memory is host memory, its kernels are torch's CPU kernels, its
fused operators are reference implementations that refuse what the real operators refuse. It proves that a program
uses the NPU's interfaces rightly; it proves nothing about precision, races, operator coverage or speed.

What the real package does not have is kept in `torch_npu.simulation`.
"""

from __future__ import annotations

import os
import sys

# torch loads this package by itself (the entry point in the .dist-info next to it), as it loads the real one. When
# torch_npu is imported first, that would come back here half-way: switched off for the time of this import.
_autoload_setting = os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1")
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"

import torch  # noqa: E402

os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = _autoload_setting

from torch_npu import _build  # noqa: E402

_C = _build.load()
sys.modules[f"{__name__}._C"] = _C

from torch_npu import npu  # noqa: E402  (needs the loaded backend)

torch.utils.rename_privateuse1_backend("npu")
torch._register_device_module("npu", npu)
torch.utils.generate_methods_for_privateuse1_backend()

from torch_npu import distributed, profiler, simulation  # noqa: E402
from torch_npu.fused import (  # noqa: E402
    npu_fused_infer_attention_score,
    npu_fusion_attention,
    npu_incre_flash_attention,
    npu_prompt_flash_attention,
    npu_rms_norm,
    npu_rotary_mul,
    npu_swiglu,
)

__version__ = "2.13.0+simulated"

__all__ = [
    "distributed",
    "npu",
    "npu_fused_infer_attention_score",
    "npu_fusion_attention",
    "npu_incre_flash_attention",
    "npu_prompt_flash_attention",
    "npu_rms_norm",
    "npu_rotary_mul",
    "npu_swiglu",
    "profiler",
    "simulation",
]

simulation.start_from_environment()


def _autoload() -> None:
    """What torch calls; importing the package has done everything."""
