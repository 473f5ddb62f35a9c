"""A small model on the device compared with the same on the CPU: each layer, forward, gradients, training steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from llava_npu.diagnostics.comparison import LIMITS, Comparison, Stage, relative_error, short
from llava_npu.diagnostics.tiny_models import TinyModel, make_batch
from llava_npu.models import LlavaNpuForConditionalGeneration
from llava_npu.ops.attention.transformers_interface import use_packed_attention
from llava_npu.ops.fuse import fuse
from llava_npu.ops.linear_cross_entropy import linear_cross_entropy

NUM_STEPS = 3
Tensors = dict[str, torch.Tensor]


@dataclass
class Trace:
    """What one run of a model gave: each layer's output, gradient and change in training, and each step's loss."""

    forward: Tensors = field(default_factory=dict)
    gradient: Tensors = field(default_factory=dict)
    steps: Tensors = field(default_factory=dict)


def compare_model(tiny: TinyModel, device: torch.device, dtypes: list[torch.dtype]) -> Iterator[Comparison]:
    """Runs the model on the CPU in float32 with plain layers, and on `device` with the fused ones in each dtype."""
    expected = _run(tiny.build(), make_batch(tiny.config), torch.float32, fused=False)
    for dtype in dtypes:
        model = tiny.build()
        limits = LIMITS["model", dtype]
        try:
            use_packed_attention(model)
            fuse(model, device)
            batch = {name: tensor.to(device) for name, tensor in make_batch(tiny.config).items()}
            actual = _run(model.to(device), batch, dtype, fused=True)
        except Exception as raised:  # noqa: BLE001  a device fails in whatever way it likes; that is the finding
            problem = f"{type(raised).__name__}: {raised}"
            yield Comparison(
                "model", tiny.name, "", "forward", "output", short(dtype), math.inf, limits["forward"], problem
            )
            continue
        stages: tuple[Stage, ...] = ("forward", "gradient", "steps")
        for stage in stages:
            for part, tensor in getattr(expected, stage).items():
                measured = getattr(actual, stage).get(part)
                error = math.inf if measured is None else relative_error(measured, tensor)
                yield Comparison("model", tiny.name, part, stage, _QUANTITY[stage], short(dtype), error, limits[stage])


_QUANTITY: dict[Stage, str] = {
    "forward": "output",
    "gradient": "gradient",
    "steps": f"change in {NUM_STEPS} steps",
}


def _run(model: LlavaNpuForConditionalGeneration, batch: Tensors, dtype: torch.dtype, fused: bool) -> Trace:
    trace = Trace()
    real = batch["attention_mask"].bool()
    hooks = [
        layer.register_forward_hook(_keep_output(trace.forward, name, real)) for name, layer in _layers(model).items()
    ]
    loss = _loss(model, batch, dtype, fused)
    for hook in hooks:
        hook.remove()
    trace.forward["loss"] = loss.detach()
    loss.backward()
    trace.gradient.update(_by_layer(model, {name: each.grad for name, each in model.named_parameters()}))
    _train(model, batch, dtype, fused, trace)
    return trace


def _loss(model: LlavaNpuForConditionalGeneration, batch: Tensors, dtype: torch.dtype, fused: bool) -> torch.Tensor:
    """Mean cross-entropy of the supervised tokens; in 16 bits as in training, under autocast over float32 weights."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    labels = batch["labels"][:, 1:]
    with torch.autocast(batch["input_ids"].device.type, dtype=dtype, enabled=dtype != torch.float32):
        hidden = model.model(**inputs, use_cache=False).last_hidden_state[:, :-1]
        if fused:
            return linear_cross_entropy(hidden, model.lm_head.weight, labels, reduction="mean")
        return F.cross_entropy(model.lm_head(hidden).flatten(0, 1), labels.flatten())


def _train(
    model: LlavaNpuForConditionalGeneration, batch: Tensors, dtype: torch.dtype, fused: bool, trace: Trace
) -> None:
    """Steps of AdamW on projector and language model, the tower frozen, as the second stage of LLaVA does."""
    model.model.vision_tower.requires_grad_(False)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    # Adam makes a whole step even of a gradient that is mere rounding, unless epsilon is of a gradient's size.
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, eps=1e-2)
    for step in range(NUM_STEPS):
        optimizer.zero_grad(set_to_none=True)
        loss = _loss(model, batch, dtype, fused)
        loss.backward()
        optimizer.step()
        trace.steps[f"loss of step {step + 1}"] = loss.detach()
    trace.steps.update(_by_layer(model, {name: each.detach() - before[name] for name, each in trained.items()}))


def _layers(model: LlavaNpuForConditionalGeneration) -> dict[str, nn.Module]:
    """The modules whose outputs are compared, in the order of the computation."""
    inner = model.model
    tower = next(module.layers for module in inner.vision_tower.modules() if hasattr(module, "layers"))
    return {
        **{f"vision layer {number}": layer for number, layer in enumerate(tower)},
        "projector": inner.multi_modal_projector,
        **{f"language layer {number}": layer for number, layer in enumerate(inner.language_model.layers)},
        "final norm": inner.language_model.norm,
    }


def _keep_output(into: Tensors, name: str, real: torch.Tensor) -> Callable[..., None]:
    def hook(module: nn.Module, args: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        # What padding turns into is nobody's business.
        of_text = tensor.shape[:2] == real.shape
        into[name] = (tensor[real] if of_text else tensor).detach().float()

    return hook


def _by_layer(model: LlavaNpuForConditionalGeneration, values: Mapping[str, torch.Tensor | None]) -> Tensors:
    """Values of parameters (gradients, changes), those of each layer as one vector.

    Of a whole layer, because single parameters may have gradients that are zero but for rounding (the key's bias in
    attention), for which no relative error means anything.
    """
    owners = {id(parameter): name for name, layer in _layers(model).items() for parameter in layer.parameters()}
    vectors: dict[str, list[torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        value = values.get(name)
        if value is not None:
            owner = owners.get(id(parameter), _outside_layers(name))
            vectors.setdefault(owner, []).append(value.detach().float().flatten().cpu())
    return {owner: torch.cat(parts) for owner, parts in vectors.items()}


def _outside_layers(name: str) -> str:
    if name.startswith("lm_head"):
        return "head"
    return "vision embeddings" if "vision_tower" in name else "token embeddings"
