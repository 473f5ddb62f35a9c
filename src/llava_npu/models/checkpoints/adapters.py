"""LoRA weights of a base model, merged into it while it is read.

Source of the method: Hu et al. 2021, "LoRA" (arXiv:2106.09685): W + (α/r) · B·A. peft itself merges whole models in
memory; here one tensor at a time is held.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llava_npu.errors import UserError
from llava_npu.models.adapters import ADAPTER_CONFIG, check_kind
from llava_npu.models.checkpoints.weight_files import read_weights

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_NAME = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<which>[AB])(?:\.default)?\.weight")


@dataclass(frozen=True)
class LowRank:
    """The update of one weight matrix: scale · up · down."""

    down: torch.Tensor
    up: torch.Tensor
    scale: float

    def added_to(self, weight: torch.Tensor) -> torch.Tensor:
        """As peft's `merge_and_unload` computes it on a CPU: the product in float32, the sum in the weight's type."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        update = (self.up.to(wide) @ self.down.to(wide)) * self.scale
        return weight + update.to(weight.dtype)


def read_adapter(folder: Path, settings: dict[str, Any]) -> dict[str, LowRank]:
    """The low-rank updates in a peft folder, by the name of the weight that each one changes.

    Raises:
        UserError: the adapter is of a kind that is not plain LoRA, or incomplete.
    """
    check_kind(settings, f"{folder / ADAPTER_CONFIG}", ("rank_pattern", "alpha_pattern"))
    file = next((folder / name for name in ADAPTER_FILES if (folder / name).is_file()), None)
    if file is None:
        raise UserError(f"{folder}: has an adapter_config.json but neither {' nor '.join(ADAPTER_FILES)}.")
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in read_weights(file):
        match = _NAME.fullmatch(name)
        if match is None:
            raise UserError(f"{file}: the weight {name} is not one of a LoRA adapter.")
        halves.setdefault(f"{match['module']}.weight", {})[match["which"]] = tensor
    broken = sorted(name for name, pair in halves.items() if len(pair) != 2)
    if broken:
        raise UserError(f"{file}: lora_A or lora_B is missing for {', '.join(broken[:6])}.")
    if not halves:
        raise UserError(f"{file}: holds no weights.")
    return {name: _low_rank(pair["A"], pair["B"], settings, name, str(file)) for name, pair in halves.items()}


def _low_rank(down: torch.Tensor, up: torch.Tensor, settings: Mapping[str, Any], name: str, file: str) -> LowRank:
    rank, alpha = _rank_and_alpha(settings, name.removesuffix(".weight"))
    shapes = f"{tuple(down.shape)} and {tuple(up.shape)}"
    if not (down.ndim == up.ndim == 2 and down.shape[0] == up.shape[1] == rank):
        raise UserError(f"{file}: lora_A and lora_B of {name} have shapes {shapes}; {ADAPTER_CONFIG} says rank {rank}.")
    if not (down.is_floating_point() and up.is_floating_point()):
        raise UserError(f"{file}: lora_A and lora_B of {name} are {down.dtype} and {up.dtype}, not floating-point.")
    return LowRank(down, up, alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank)


def _rank_and_alpha(settings: Mapping[str, Any], module: str) -> tuple[int, float]:
    """Of one layer; patterns give single layers a rank or α of their own, by peft's rule."""

    def of_layer(patterns: str, usual: Any) -> Any:
        own = settings.get(patterns) or {}
        key = next((key for key in own if re.match(rf"(.*\.)?({key})$", module)), None)
        return usual if key is None else own[key]

    return of_layer("rank_pattern", settings["r"]), of_layer("alpha_pattern", settings["lora_alpha"])


def merged(
    base: Iterator[tuple[str, torch.Tensor]], adapter: dict[str, LowRank], source: str
) -> Iterator[tuple[str, torch.Tensor]]:
    """A base model's weights with the adapter added.

    Raises:
        UserError: a weight that the adapter changes has another shape in the base or, at the end, is not there.
    """
    unused = set(adapter)
    for name, tensor in base:
        if name in unused:
            unused.remove(name)
            update = adapter[name]
            shape = (update.up.shape[0], update.down.shape[1])
            if tuple(tensor.shape) != shape:
                raise UserError(
                    f"{source}: the adapter changes {name} as a matrix of {shape}; the base model's is "
                    f"{tuple(tensor.shape)}. Give the base that it was trained on."
                )
            tensor = update.added_to(tensor)
        yield name, tensor
    if unused:
        raise UserError(
            f"{source}: the base model lacks weights that the adapter changes: {', '.join(sorted(unused)[:6])}."
        )
