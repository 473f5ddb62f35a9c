"""`torch.compile`, layer by layer: all layers of the language model share the graphs of one."""

from __future__ import annotations

from llava_npu.devices import Device
from llava_npu.errors import UserError
from llava_npu.models.modeling import LlavaNpuForConditionalGeneration
from llava_npu.ops.attention.transformers_interface import keep_attention_out_of_compiled_graphs


def compile_layers(model: LlavaNpuForConditionalGeneration, device: Device, backend: str | None) -> None:
    """Has each layer of the language model compiled when it first runs; nothing where `backend` is None.

    Weights and their names stay as they are. Tower, projector and loss are not compiled: a tower is a small part of a
    step, and the loss has its own kernel.

    Raises:
        UserError: the device cannot run compiled code.
    """
    if backend is None:
        return
    if not device.compiles:
        raise UserError(
            f"compile: torch.compile makes no code for {device.kind} devices; leave `compile` out (the operators that "
            "matter are fused there without it)."
        )
    keep_attention_out_of_compiled_graphs()
    for layer in model.model.language_model.layers:
        layer.compile(backend=backend)
