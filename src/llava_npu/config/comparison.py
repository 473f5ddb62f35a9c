"""The schema of a comparison: a grid of runs, and how each is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from llava_npu.config.section import PathText, Section


class BenchmarkConfig(Section):
    """A benchmark that every model of the grid is evaluated on; see docs/evaluation.md."""

    name: str = Field(description="The benchmark, as `llava-npu eval` knows it.")
    data: PathText = Field(description="Its file, or the folder that contains it.")
    label: str | None = Field(None, description="Its name in tables; default: `name`.")
    answer: Literal["generate", "likelihood", "likelihood-letter"] = Field(
        "generate", description="`generate`, or choose the likeliest option by its text or its letter."
    )
    images: Literal["given", "none", "shuffled"] = Field(
        "given", description="The images as given; or, as a baseline, none or those of other questions."
    )
    template: str | None = Field(
        None, description="Conversation template; default: the one that the last stage was trained with."
    )
    metric: str | None = Field(
        None, description="Which of the benchmark's metrics the table shows; default: its first."
    )
    extraction: str | None = Field(
        None, description="Rule by which answers are extracted; default: the metric's first."
    )
    part: str | None = Field(None, description="Show this category's score instead of the overall one.")
    max_new_tokens: int | None = Field(None, ge=1, description="Maximum tokens of an answer; default: the benchmark's.")
    batch_size: int = Field(8, ge=1, description="Number of questions answered together.")


class ComparisonConfig(Section):
    """A grid of trials: every encoder with every projector, for every value of what else varies."""

    output: PathText = Field(description="The folder of the comparison: a folder per trial, the tables, the page.")
    title: str | None = Field(None, description="Headline of the page; default: the output folder's name.")
    note: str | None = Field(
        None, description="What readers must know about the data and scale; shown with every result."
    )
    language_model: PathText = Field(description="As `model.language_model` of a run.")
    encoders: list[str | dict[str, Any]] = Field(
        min_length=1,
        description="Vision towers: each a folder or hub id, or a mapping with `vision_tower` (also of two), "
        "other keys of a run's `model` section that belong to the tower, and a `name` for tables.",
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
        description="Stage 1, as in a run's file; without `output`, `stage`, `seed` and `device`, and without the keys "
        "of `model` that the grid sets."
    )
    finetune: dict[str, Any] | None = Field(
        None, description="Stage 2, likewise; it starts from the model of each trial's stage 1. null: only stage 1."
    )
    benchmarks: list[BenchmarkConfig] = Field(default_factory=list, description="The benchmarks; see below.")
    held_out: PathText | None = Field(
        None,
        description="Captions that no stage is trained on, in the format of training data: the table shows their loss.",
    )
    share_features: bool = Field(
        True,
        description="Compute a frozen tower's output for an image once, and share it between trials, if the disk has "
        "room for it.",
    )
    examples: int = Field(
        12, ge=0, description="Number of images of the first benchmark that the page shows with every model's answer."
    )
    seed: int = Field(0, ge=0, description="Random seed of every run.")
    seeds: int | list[int] | None = Field(
        None,
        description="Repeat every trial with this many seeds (`3`: 0, 1 and 2), or with these: the report then has a "
        "row per model with mean and standard deviation, and tests over seeds and questions together.",
    )
    correction: Literal["none", "holm", "benjamini-hochberg"] = Field(
        "none",
        description="Correct the p values over seeds for their number: Holm's (any false finding) or Benjamini and "
        "Hochberg's (share of false findings).",
    )
    devices: list[str] = Field(
        default_factory=lambda: ["auto"],
        min_length=1,
        description="Devices on which trials run in parallel, such as `[npu:0, npu:1]`; `auto`: all devices of the "
        "best kind.",
    )

    devices_per_trial: int = Field(
        1, ge=1, description="Number of devices that train one trial together, for models that do not fit on one."
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

    @field_validator("seeds")
    @classmethod
    def _seeds_differ(cls, seeds: int | list[int] | None) -> int | list[int] | None:
        if isinstance(seeds, int) and not 1 <= seeds <= _MAX_SEEDS:
            raise ValueError(f"takes a number of seeds, from 1 to {_MAX_SEEDS:,}, or a list of them")
        if isinstance(seeds, list) and (not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0):
            raise ValueError("a list of seeds holds different whole numbers from 0")
        return seeds

    @model_validator(mode="after")
    def _one_way_to_vary_the_seed(self) -> ComparisonConfig:
        if self.seeds is not None and "seed" in self.vary:
            raise ValueError("`seeds` and `vary.seed` both set the seeds; keep one of them")
        return self

    @property
    def varied(self) -> dict[str, list[Any]]:
        """`vary`, and the seeds."""
        if self.seeds is None:
            return self.vary
        seeds = list(range(self.seeds)) if isinstance(self.seeds, int) else self.seeds
        return {**self.vary, "seed": seeds}

    @property
    def output_path(self) -> Path:
        return Path(self.output)


_MAX_SEEDS = 1_000
_VARIABLE = ("language_model", "align", "finetune", "seed")
