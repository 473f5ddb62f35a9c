"""In which numbers a run computes."""

from __future__ import annotations

from typing import Literal

import torch

from llava_npu.devices import Device

Precision = Literal["auto", "fp32", "bf16"]


def compute_dtype(precision: Precision, device: Device) -> torch.dtype | None:
    """The type of products under autocast; None: float32 throughout."""
    if precision == "fp32":
        return None
    return torch.bfloat16 if precision == "bf16" else device.autocast_dtype
