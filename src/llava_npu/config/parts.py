"""Which parts of the model are trained, and how: as the stage has it, unless a part's own section says otherwise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from pydantic import Field, model_validator

from llava_npu.config.section import Section

StageName = Literal["align", "finetune"]
PartName = Literal["vision_tower", "projector", "language_model"]
Training = Literal["frozen", "full", "lora"]
PARTS: tuple[PartName, ...] = get_args(PartName)

_STAGES: dict[StageName, dict[PartName, Training]] = {
    "align": {"vision_tower": "frozen", "projector": "full", "language_model": "frozen"},
    "finetune": {"vision_tower": "frozen", "projector": "full", "language_model": "full"},
}


class _PartConfig(Section):
    learning_rate: float | None = Field(
        None, gt=0, description="Peak learning rate of this part; default: `optimizer.learning_rate`."
    )
    weight_decay: float | None = Field(
        None, ge=0, description="Weight decay of this part; default: `optimizer.weight_decay`."
    )


class AdaptablePartConfig(_PartConfig):
    """How this part is trained."""

    train: Training | None = Field(
        None,
        description="`frozen`, `full` (all weights), or `lora` (adapters on its frozen linear layers, see `lora`); "
        "default: as `stage` has it.",
    )


class ProjectorPartConfig(_PartConfig):
    """How the projector is trained. It is small and starts from new weights, so it has no adapters."""

    train: Literal["frozen", "full"] | None = Field(None, description="`frozen` or `full`; default: `full`.")


class PartsConfig(Section):
    """What is trained, part by part, where it differs from `stage`."""

    vision_tower: AdaptablePartConfig = AdaptablePartConfig()
    projector: ProjectorPartConfig = ProjectorPartConfig()
    language_model: AdaptablePartConfig = AdaptablePartConfig()


class LoraConfig(Section):
    """The adapters of the parts with `train: lora`. The defaults are those of LLaVA-1.5's LoRA recipe."""

    rank: int = Field(128, ge=1, description="Inner dimension of an adapter.")
    # Not strict, so that YAML's whole numbers are taken for what is a float here.
    alpha: float = Field(256, gt=0, description="An adapter's output is scaled by alpha ÷ rank.", strict=False)
    dropout: float = Field(0.05, ge=0, lt=1, description="Dropout on an adapter's input in training.")
    use_dora: bool = Field(
        False,
        description="DoRA: the length of each weight row is learned separately from its direction. Slower, often "
        "better.",
    )
    use_rslora: bool = Field(
        False, description="rsLoRA: scale by alpha ÷ √rank, so that high ranks learn as fast as low ones."
    )
    targets: list[str] | None = Field(
        None,
        description="Names of the linear layers that get an adapter, such as [q_proj, v_proj], in the parts with "
        "`train: lora`; default: all of them except the language model's head.",
    )
    base_bits: Literal[4, 8] | None = Field(
        None,
        description="QLoRA: keep the weights of the adapted layers in 4 bits (NF4) or 8 bits, with bitsandbytes: on "
        "CUDA, and 4 bits on CPUs, slowly; on NPUs 4 bits with a bitsandbytes compiled for them.",
    )

    @model_validator(mode="after")
    def _supported_together(self) -> LoraConfig:
        if self.use_dora and self.base_bits == 8:
            raise ValueError("peft has no DoRA for 8-bit weights; set `base_bits` to 4, or `use_dora` to false")
        return self


@dataclass(frozen=True)
class Part:
    """One part, with defaults filled in.

    Attributes:
        train: "frozen", "full" or "lora".
        learning_rate: at the peak of its schedule.
        weight_decay: of its matrices; norms and biases have none.
    """

    train: Training
    learning_rate: float
    weight_decay: float


def resolve_parts(
    stage: StageName, parts: PartsConfig, learning_rate: float, weight_decay: float
) -> dict[PartName, Part]:
    """Every part's settings: its own, or those of the stage and the optimizer."""
    resolved: dict[PartName, Part] = {}
    for name in PARTS:
        own: AdaptablePartConfig | ProjectorPartConfig = getattr(parts, name)
        resolved[name] = Part(
            train=own.train or _STAGES[stage][name],
            learning_rate=learning_rate if own.learning_rate is None else own.learning_rate,
            weight_decay=weight_decay if own.weight_decay is None else own.weight_decay,
        )
    return resolved
