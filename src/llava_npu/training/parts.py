"""The parts of a model in training: which weights belong to which, what learns, in which type and mode each is kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from llava_npu.config.parts import LoraConfig, Part, PartName, StageName
from llava_npu.devices import Device
from llava_npu.errors import UserError
from llava_npu.models.adapters import AdapterSettings, add_adapters, choose_layers, is_adapter_parameter, linear_layers
from llava_npu.models.configuration import LlavaNpuConfig
from llava_npu.models.modeling import LlavaNpuForConditionalGeneration
from llava_npu.models.vision.towers import select_features
from llava_npu.ops.attention.transformers_interface import keep_attention_out_of_compiled_graphs
from llava_npu.training.quantization import quantize_base

Precision = Literal["auto", "fp32", "bf16", "fp16"]

# The type of products under autocast; None: float32 throughout. `auto` is the device's own.
DTYPES: dict[Precision, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def compute_dtype(precision: Precision, device: Device) -> torch.dtype | None:
    """The type of products under autocast; None: float32 throughout."""
    return device.autocast_dtype if precision == "auto" else DTYPES[precision]


# Where the modules of each part are; all else, the head, is the language model's.
PREFIXES: dict[PartName, str] = {
    "vision_tower": "model.vision_tower.",
    "projector": "model.multi_modal_projector.",
    "language_model": "model.language_model.",
}

# The conversation template of a stage where the configuration names none; None: the model's own.
STAGE_TEMPLATES: dict[StageName, str | None] = {"align": "plain", "finetune": None}


def part_of(name: str) -> PartName:
    """The part that a parameter or module of the model belongs to, by its name; the head is the language model's."""
    if name == "model.image_newline":  # of anyres: it comes with the projector's tokens
        return "projector"
    for part in ("vision_tower", "projector"):
        if f"{name}.".startswith(PREFIXES[part]):
            return part
    return "language_model"


def adapter_settings(lora: LoraConfig) -> AdapterSettings:
    return AdapterSettings(lora.rank, lora.alpha, lora.dropout, lora.use_dora, lora.use_rslora)


def prepare_parts(
    model: LlavaNpuForConditionalGeneration,
    parts: Mapping[PartName, Part],
    compute_dtype: torch.dtype | None,
    checkpointing: bool | int,
    lora: LoraConfig | None = None,
) -> None:
    """Sets what is trained, adds adapters, and sets each part's mode; weights stay as they are until `place_weights`.

    Args:
        compute_dtype: of a base in fewer bits (`lora.base_bits`).
        checkpointing: whether activations are recomputed in the backward pass, or in how many layers.
        lora: the adapters of parts with `train: lora`; None: the default ones.

    Raises:
        UserError: there are fewer layers than are to be recomputed.
    """
    unused = unused_tower_parameters(model.config) if parts["vision_tower"].train != "frozen" else set()
    adapted = [name for name, part in parts.items() if part.train == "lora"]
    if adapted:
        lora = lora or LoraConfig()
        layers = [layer for part in adapted for layer in linear_layers(model, PREFIXES[part], unused)]
        layers = choose_layers(layers, lora.targets)
        add_adapters(model, layers, adapter_settings(lora))
        if lora.base_bits is not None:
            quantize_base(model, lora.base_bits, compute_dtype)
    for name, parameter in model.named_parameters():
        in_full = parts[part_of(name)].train == "full" and name not in unused
        parameter.requires_grad_(in_full or is_adapter_parameter(name))
    _set_modes(model, parts, bool(checkpointing))
    if checkpointing is not True:
        recompute_first(model, checkpointing)


def kept_types(model: nn.Module, compute_dtype: torch.dtype | None) -> dict[int, torch.dtype]:
    """In which type each parameter, by its `id`, is kept in training.

    Trained weights are float32 (small updates vanish in 16 bits). Frozen ones are kept in `compute_dtype`, if given:
    half the memory, and the same products as under autocast. Batch normalisation stays float32 as a whole: its
    statistics are buffers, and weights in another type than they are refused.
    """
    statistical = filter(is_batch_norm, model.modules())
    unrounded = {id(parameter) for module in statistical for parameter in module.parameters()}
    return {
        id(parameter): torch.float32
        if compute_dtype is None or parameter.requires_grad or id(parameter) in unrounded
        else compute_dtype
        for parameter in model.parameters()
    }


def place_weights(module: nn.Module, device: torch.device, types: Mapping[int, torch.dtype]) -> None:
    """Moves weights to where they are trained and into the type that they have there, one after the other.

    Until now they may be mapped from files, and of other types. A frozen weight that changes neither place nor type
    stays mapped: on a CPU all processes share it. One that is trained becomes this process's own.

    Args:
        types: from `kept_types`.
    """
    if device.type == "cpu":
        device = torch.device("cpu")  # accelerate numbers it in a launch, and `to` would copy to "cpu:0"
    for parameter in module.parameters():
        # A weight in fewer bits is packed as it is moved, by the layer that it belongs to.
        place = device if type(parameter) is nn.Parameter else parameter.device
        parameter.data = parameter.data.to(place, types[id(parameter)], copy=parameter.requires_grad)
    module.to(device)  # its buffers


def trained_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of everything that learns, in a fixed order."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def unused_tower_parameters(config: LlavaNpuConfig) -> set[str]:
    """Names of the tower's weights that shape nothing the projector sees: layers behind the chosen one, a pooling head.

    They get no gradient; engines that wait for the gradient of all that is trained would wait for ever.
    """
    with torch.device("meta"):  # the graph alone, without numbers
        tower = AutoModel.from_config(config.vision_config)
        outputs = tower(torch.zeros(1, *config.tower.pixels), output_hidden_states=True)
    features = select_features(outputs, config.tower, config.feature_layers, config.keep_prefix_tokens)
    used = _leaves(torch.cat(features, dim=-1))
    return {
        f"{PREFIXES['vision_tower']}{name}" for name, parameter in tower.named_parameters() if id(parameter) not in used
    }


def _leaves(tensor: torch.Tensor) -> set[int]:
    """The ids of the parameters in a tensor's graph."""
    found, seen, waiting = set(), set(), [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        waiting.extend(following for following, _ in node.next_functions)
    return found


def _set_modes(model: LlavaNpuForConditionalGeneration, parts: Mapping[PartName, Part], checkpointing: bool) -> None:
    """Training mode for what learns only: batch normalisation and dropout of a frozen part must not move either."""
    inner = model.model
    model.train()
    inner.vision_tower.train(parts["vision_tower"].train != "frozen")
    inner.multi_modal_projector.train(parts["projector"].train != "frozen")
    inner.language_model.train(parts["language_model"].train != "frozen")
    # A tower's statistics stay those of its own training: a micro-batch's would differ with its size.
    for module in inner.vision_tower.modules():
        if is_batch_norm(module):
            module.eval()
    if checkpointing:
        # Transformers recomputes only in modules that are in training mode; without dropout the mode changes no number.
        inner.language_model.train()
        recompute_activations(inner.language_model)
        if parts["vision_tower"].train != "frozen" and inner.vision_tower.supports_gradient_checkpointing:
            recompute_activations(inner.vision_tower)


def recomputable_layers(model: LlavaNpuForConditionalGeneration) -> list[GradientCheckpointingLayer]:
    """Layers whose activations can be recomputed, in the order in which they run: those of the tower that learn, and
    all of the language model, through which gradients pass even where it is frozen.
    """
    tower, text = (
        [module for module in part.modules() if isinstance(module, GradientCheckpointingLayer)]
        for part in (model.model.vision_tower, model.model.language_model)
    )
    return [layer for layer in tower if any(weight.requires_grad for weight in layer.parameters())] + text


def recompute_first(model: LlavaNpuForConditionalGeneration, count: int) -> None:
    """Of a model prepared with recomputation, recomputes in the first `count` of `recomputable_layers` alone.

    The first, as the last layers' activations are freed before those of the first ones are made again.

    Raises:
        UserError: there are fewer.
    """
    layers = recomputable_layers(model)
    if count > len(layers):
        raise UserError(
            f"gradient_checkpointing: {count}, but activations can be recomputed in {len(layers)} layers of this "
            "model. Set a number up to that, or true for all."
        )
    for number, layer in enumerate(layers):
        layer.gradient_checkpointing = number < count


def recompute_activations(module: PreTrainedModel) -> None:
    """Gradient checkpointing in all layers of a part that are in training mode."""
    # Its name in transformers 5.18, the oldest that we take, is deprecated in later ones.
    enable = getattr(module, "activation_checkpointing_enable", None) or module.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def compile_layers(model: LlavaNpuForConditionalGeneration, device: Device, backend: str | None) -> None:
    """Has `torch.compile` compile each layer of the language model when it first runs; nothing for `backend` None.

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


def frozen_weights(model: LlavaNpuForConditionalGeneration) -> dict[str, torch.Tensor]:
    """What is not trained, by its name in the model, as it is now: engines change none of these tensors."""
    trained = {name for name, _ in trained_parameters(model)}
    buffers = {name for name, _ in model.named_buffers()}
    return {
        name: tensor.clone() if name in buffers else tensor
        for name, tensor in model.state_dict().items()
        if name not in trained
    }


def is_batch_norm(module: nn.Module) -> bool:
    """Whether a module keeps statistics, which makes it float32 throughout."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm)
