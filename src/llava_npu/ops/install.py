"""One call that makes a built model use this project's operations."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from llava_npu.ops.attention.transformers_interface import use_packed_attention
from llava_npu.ops.fuse import FusedModules, fuse


def install_kernels(model: PreTrainedModel, device: torch.device) -> FusedModules:
    """Switches attention, in the language model and the vision tower, and fuses what `device` has operators for.

    Call it once the model is on its device, before it is wrapped or compiled. The numbers stay those of the model, up
    to rounding; weights and state-dict keys are untouched.
    """
    use_packed_attention(model)
    return fuse(model, device)
