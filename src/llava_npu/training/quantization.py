"""QLoRA: adapters on layers whose own weights are kept in 4 or 8 bits, through bitsandbytes.

Source: Dettmers et al. 2023, "QLoRA" (arXiv:2305.14314): NF4 with double quantisation; 8 bits as in Dettmers et al.
2022, "LLM.int8()" (arXiv:2208.07339), with its threshold of 6.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import nn

from llava_npu.config import RunConfig
from llava_npu.devices import Device
from llava_npu.errors import UserError


def check_quantization(config: RunConfig, device: Device) -> None:
    """Raises `UserError` where `lora.base_bits` asks for what this device has no operators for."""
    bits = config.lora.base_bits
    if bits is None or not config.has_adapters:
        return
    if bits not in device.quantized_bits:
        hint = f" {device.quantization_hint}" if device.quantization_hint else ""
        raise UserError(
            f"lora.base_bits: bitsandbytes, which trains adapters on a base in {bits} bits (QLoRA), has no operators "
            f"for that on {device.kind}. Remove `lora.base_bits`: LoRA on the 16-bit base needs 2 bytes per weight (13 "
            "GiB for 7 B), which one device of 64 GB holds; `gradient_checkpointing`, fewer `lora.targets` and a "
            f"smaller `micro_batch_size` save more.{hint}"
        )
    _bitsandbytes()


def quantize_base(model: nn.Module, bits: Literal[4, 8], compute_dtype: torch.dtype | None) -> None:
    """Has the weights under the adapters kept in `bits`; they are quantised when they are moved to their device."""
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.base_layer = _quantized(cast(nn.Linear, module.get_base_layer()), bits, compute_dtype)


def _quantized(layer: nn.Linear, bits: Literal[4, 8], compute_dtype: torch.dtype | None) -> nn.Module:
    library = _bitsandbytes()
    shape: dict[str, Any] = {"bias": layer.bias is not None, "device": "meta"}
    if bits == 4:
        new = library.nn.Linear4bit(
            layer.in_features,
            layer.out_features,
            compute_dtype=compute_dtype or torch.float32,
            quant_type="nf4",
            compress_statistics=True,
            **shape,
        )
        new.weight = library.nn.Params4bit(
            layer.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True, module=new
        )
    else:
        new = library.nn.Linear8bitLt(
            layer.in_features, layer.out_features, has_fp16_weights=False, threshold=6.0, **shape
        )
        new.weight = library.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
    new.bias = layer.bias
    return new


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError("lora.base_bits needs bitsandbytes: pip install 'llava-npu[train,quantize]'") from error
    return bitsandbytes
