"""Loading the language model's weights in 4 or 8 bits, for inference where memory is short.

The weights are rounded while loading, by bitsandbytes (NF4 with double quantisation, Dettmers et al. 2023,
arXiv:2305.14314; LLM.int8(), Dettmers et al. 2022, arXiv:2208.07339). Tower, projector and head stay as they are: they
are small, and images suffer first.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from llava_npu.devices.base import Device
from llava_npu.errors import UserError

_KEPT_WHOLE = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]


def quantization_config(bits: int, device: Device, compute_dtype: torch.dtype) -> Any:
    """What `load` needs to hold weights in this many bits; None for 16.

    Raises:
        UserError: this kind of device cannot, or bitsandbytes is missing.
    """
    if bits == 16:
        return None
    if bits not in device.quantized_bits:
        can = ", ".join(str(each) for each in (*device.quantized_bits, 16))
        hint = f" {device.quantization_hint}" if device.quantization_hint else ""
        raise UserError(f"weights in {bits} bits on {device.kind}: not offered. This device can: {can}.{hint}")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"weights in {bits} bits need bitsandbytes: pip install 'llava-npu[quantize]'.")
    from transformers import BitsAndBytesConfig

    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=_KEPT_WHOLE)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=_KEPT_WHOLE,
    )
