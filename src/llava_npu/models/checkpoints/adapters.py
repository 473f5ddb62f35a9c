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
    return {
        name: LowRank(pair["A"], pair["B"], _scale(settings, name.removesuffix(".weight")))
        for name, pair in halves.items()
    }


def _scale(settings: Mapping[str, Any], module: str) -> float:
    """α/r, or α/√r, of one layer; patterns give single layers a rank or α of their own, by peft's rule."""

    def of_layer(patterns: str, usual: Any) -> float:
        own = settings.get(patterns) or {}
        key = next((key for key in own if re.match(rf"(.*\.)?({key})$", module)), None)
        return float(usual if key is None else own[key])

    rank, alpha = of_layer("rank_pattern", settings["r"]), of_layer("alpha_pattern", settings["lora_alpha"])
    return alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank


def merged(
    base: Iterator[tuple[str, torch.Tensor]], adapter: dict[str, LowRank], source: str
) -> Iterator[tuple[str, torch.Tensor]]:
    """A base model's weights with the adapter added.

    Raises:
        UserError: at the end, if the base lacks a weight that the adapter changes.
    """
    unused = set(adapter)
    for name, tensor in base:
        if name in unused:
            unused.remove(name)
            tensor = adapter[name].added_to(tensor)
        yield name, tensor
    if unused:
        raise UserError(
            f"{source}: the base model lacks weights that the adapter changes: {', '.join(sorted(unused)[:6])}."
        )
