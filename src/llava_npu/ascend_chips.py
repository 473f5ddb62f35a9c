"""Which Ascend chips there are, by the names that torch_npu and npu-smi give them.

Outside `devices/`, which imports torch: `doctor` reads this where torch is broken.

Sources: the names in torch_npu/csrc/core/npu/NpuVariables.cpp (Ascend/pytorch, commit 9e73e708); the operators' product
tables in op-plugin's docs/zh/custom_APIs/torch_npu (Ascend/op-plugin, commit 517f2e7d); devices of a node as in
tensor_cast/device.py (Ascend/msmodeling, commit 84fec853).
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Chips that have the same operators.

    Attributes:
        pattern: of their names, without "Ascend".
        name: of the family.
        per_node: devices that one machine of the family has, as torch counts them; None where it differs.
        missing: what this project needs and they lack, or "".
    """

    pattern: str
    name: str
    per_node: int | None = None
    missing: str = ""


_NO_TRAINING = "the fused attention operators for training (npu_fusion_attention)"

FAMILIES = (
    Family(r"910B[1-4].*", "Atlas A2", per_node=8),
    Family(r"910_93\d\d", "Atlas A3", per_node=16),  # eight packages of two dies, each die a device
    Family(r"950.*", "Ascend 950"),
    Family(r"910(Premium|Pro)?[AB]", "the first Ascend 910", missing=f"{_NO_TRAINING} and bfloat16"),
    Family(r"310.*", "Ascend 310", missing=f"{_NO_TRAINING} and for prompts (npu_fused_infer_attention_score)"),
)


def family_of(name: str) -> Family | None:
    """The family of the chip called `name`, as in "Ascend910B3" or "310P3"; None if it is not listed."""
    bare = name.removeprefix("Ascend").partition(" ")[0]
    return next((family for family in FAMILIES if re.fullmatch(family.pattern, bare)), None)


def refusal(name: str) -> str:
    """One sentence on why the chip called `name` cannot be used, or "" if nothing is known against it."""
    family = family_of(name)
    if family is None or not family.missing:
        return ""
    return f"{name} ({family.name}) has no operators for what llava-npu does: it lacks {family.missing}."
