"""The schema of a comparison: a grid of runs, and how each is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from llava_npu.config.section import Section


class BenchmarkConfig(Section):
    """A benchmark that every model of the grid is put to; see docs/evaluation.md."""

    name: str = Field(description="The benchmark, as `llava-npu eval` knows it.")
    data: str = Field(description="Its file, or a folder that holds it.")
    label: str | None = Field(None, description="How tables call it; by default its name.")
    answer: Literal["generate", "likelihood", "likelihood-letter"] = Field(
        "generate", description="`generate`, or choose the likeliest option by its text or its letter."
    )
    images: Literal["given", "none", "shuffled"] = Field(
        "given", description="The pictures as given; or, for a baseline, none or wrong ones."
    )
    template: str | None = Field(
        None, description="Conversation template; by default the one that the last stage was trained with."
    )
    metric: str | None = Field(
        None, description="Which of the benchmark's metrics the table shows; by default its first."
    )
    extraction: str | None = Field(None, description="By which rule answers are read; by default the metric's first.")
    part: str | None = Field(None, description="Show this category's score in place of the overall one.")
    max_new_tokens: int | None = Field(None, ge=1, description="Longest answer; by default as the benchmark says.")
    batch_size: int = Field(8, ge=1, description="Questions answered at once.")


class ComparisonConfig(Section):
    """A grid of runs: every encoder with every projector, for every value of what else varies."""

    output: str = Field(description="The folder of the comparison: a folder for each cell, the tables, the page.")
    title: str | None = Field(None, description="Headline of the page; by default the output folder's name.")
    note: str | None = Field(None, description="What readers must know of the data and scale; shown with every result.")
    language_model: str = Field(description="As `model.language_model` of a run.")
    encoders: list[str | dict[str, Any]] = Field(
        min_length=1,
        description="Vision towers: each a folder or hub id, or a mapping with `vision_tower`, other keys of a run's "
        "`model` section that belong to the tower, and a `name` for tables.",
    )
    projectors: list[str | dict[str, Any]] = Field(
        min_length=1,
        description="Projectors: each a type, or a mapping with `type`, its options, and a `name` for tables.",
    )
    vary: dict[str, list[Any]] = Field(
        default_factory=dict,
        description="What else varies: any key of this file, with dots, and its values, as in "
        "`align.optimizer.learning_rate: [1e-3, 2e-3]` or `seed: [0, 1, 2]`.",
    )
    align: dict[str, Any] = Field(
        description="Stage 1, as in a run's file; without `output`, `stage`, `seed` and `device`, and without what the "
        "grid says of the `model`."
    )
    finetune: dict[str, Any] | None = Field(
        None, description="Stage 2, likewise; it goes on from each cell's stage 1. Left out: only stage 1."
    )
    benchmarks: list[BenchmarkConfig] = Field(default_factory=list, description="What is measured; see below.")
    held_out: str | None = Field(
        None,
        description="Captions that no stage is trained on, in the form of training data: the table shows their loss.",
    )
    share_features: bool = Field(
        True,
        description="Compute what a frozen tower gives for an image once, and share it between cells, where the disk "
        "has room for it.",
    )
    examples: int = Field(
        12, ge=0, description="Pictures of the first benchmark that the page shows with every model's answer."
    )
    seed: int = Field(0, ge=0, description="Of every run.")
    devices: list[str] = Field(
        default_factory=lambda: ["auto"],
        min_length=1,
        description="Cells run side by side on these, as in `[npu:0, npu:1]`; `auto`: on all devices of the best kind.",
    )

    devices_per_cell: int = Field(
        1, ge=1, description="How many devices train a cell together: for models that one does not hold."
    )

    @field_validator("vary")
    @classmethod
    def _something_varies(cls, vary: dict[str, list[Any]]) -> dict[str, list[Any]]:
        for key, values in vary.items():
            if not values:
                raise ValueError(f"{key} has no values")
            if key.split(".")[0] not in _VARIABLE:
                raise ValueError(f"`{key}` cannot vary; what can is in {', '.join(_VARIABLE)}")
        return vary

    @property
    def output_path(self) -> Path:
        return Path(self.output).expanduser()


_VARIABLE = ("language_model", "align", "finetune", "seed")
