"""Which parts of the model are trained, and how: what the stage says, unless a part's own section says otherwise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from pydantic import Field

from llava_npu.config.section import Section

StageName = Literal["align", "finetune"]
PartName = Literal["vision_tower", "projector", "language_model"]
Training = Literal["frozen", "full"]
PARTS: tuple[PartName, ...] = get_args(PartName)

_STAGES: dict[StageName, dict[PartName, Training]] = {
    "align": {"vision_tower": "frozen", "projector": "full", "language_model": "frozen"},
    "finetune": {"vision_tower": "frozen", "projector": "full", "language_model": "full"},
}


class PartConfig(Section):
    """How this part is trained."""

    train: Training | None = Field(None, description="`frozen` or `full`; by default what `stage` says.")
    learning_rate: float | None = Field(
        None, gt=0, description="Its own peak learning rate; by default `optimizer.learning_rate`."
    )
    weight_decay: float | None = Field(
        None, ge=0, description="Its own weight decay; by default `optimizer.weight_decay`."
    )


class PartsConfig(Section):
    """What is trained, part by part, where it differs from what `stage` says."""

    vision_tower: PartConfig = PartConfig()
    projector: PartConfig = PartConfig()
    language_model: PartConfig = PartConfig()


@dataclass(frozen=True)
class Part:
    """One part, with nothing left open.

    Attributes:
        train: "frozen" or "full".
        learning_rate: at the peak of its schedule.
        weight_decay: of its matrices; norms and biases have none.
    """

    train: Training
    learning_rate: float
    weight_decay: float


def resolve_parts(
    stage: StageName, parts: PartsConfig, learning_rate: float, weight_decay: float
) -> dict[PartName, Part]:
    """Every part's settings, from the stage's and the optimizer's where it has none of its own."""
    resolved: dict[PartName, Part] = {}
    for name in PARTS:
        own: PartConfig = getattr(parts, name)
        resolved[name] = Part(
            train=own.train or _STAGES[stage][name],
            learning_rate=learning_rate if own.learning_rate is None else own.learning_rate,
            weight_decay=weight_decay if own.weight_decay is None else own.weight_decay,
        )
    return resolved
