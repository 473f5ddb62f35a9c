"""In which numbers a run computes."""

from __future__ import annotations

from typing import Literal

import torch

from llava_npu.devices import Device

Precision = Literal["auto", "fp32", "bf16", "fp16"]

# The type of products under autocast; None: float32 throughout. `auto` is the device's own.
DTYPES: dict[Precision, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def compute_dtype(precision: Precision, device: Device) -> torch.dtype | None:
    """The type of products under autocast; None: float32 throughout."""
    return device.autocast_dtype if precision == "auto" else DTYPES[precision]
