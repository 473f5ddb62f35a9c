"""A trial's folder: what is to be run, what came out, or why nothing did.

trials/NAME-DIGEST/
  trial.json         the trial, with its whole resolved runs, and what is measured
  align/, finetune/ the run folders of `llava-npu train`
  evaluation/       a folder for each benchmark, as `llava-npu eval` writes it; held-out/ has the loss of each caption
  parts/            what was measured in addition, each piece once
  result.json       everything that tables show; there once the trial is finished
  failure.json      why it is not
  trial.log          what its worker printed
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llava_npu.comparison.grid import Trial
from llava_npu.comparison.results import Result
from llava_npu.config import RunConfig
from llava_npu.config.comparison import BenchmarkConfig
from llava_npu.files.atomic import write_text
from llava_npu.files.json_objects import read_json

TRIAL, RESULT, FAILURE, LOG, PARTS = "trial.json", "result.json", "failure.json", "trial.log", "parts"
EVALUATION = "evaluation"
HELD_OUT = f"{EVALUATION}/held-out"
DELETE = "Delete it; its content is computed again"  # a damaged file of a comparison


@dataclass(frozen=True)
class Measured:
    """What is measured of every trial.

    Attributes:
        benchmarks: with the checksum of each one's data.
        held_out: file of captions, and its checksum; None if there is none.
        examples: images of the first benchmark that every model describes.
        share_features: whether the images' features are shared between trials.
    """

    benchmarks: tuple[tuple[BenchmarkConfig, str], ...]
    held_out: tuple[str, str] | None
    examples: int
    share_features: bool

    def as_json(self) -> dict[str, Any]:
        return {
            "benchmarks": [
                [benchmark.model_dump(mode="json", exclude_defaults=True), sha256]
                for benchmark, sha256 in self.benchmarks
            ],
            "held_out": list(self.held_out) if self.held_out else None,
            "examples": self.examples,
            "share_features": self.share_features,
        }

    def identity(self) -> dict[str, Any]:
        """All that the result depends on: not where files are, nor how many questions are answered together."""
        values = self.as_json()
        for benchmark, _ in values["benchmarks"]:
            for free in ("data", "batch_size"):
                benchmark.pop(free, None)
        return {**values, "held_out": self.held_out and self.held_out[1], "share_features": None}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Measured:
        held_out = values["held_out"]
        return cls(
            benchmarks=tuple((BenchmarkConfig.model_validate(each), sha256) for each, sha256 in values["benchmarks"]),
            held_out=(held_out[0], held_out[1]) if held_out else None,
            examples=values["examples"],
            share_features=values["share_features"],
        )


@dataclass(frozen=True)
class Failure:
    """Why a trial has no result: `impossible` parts that do not fit each other, or a run that `failed`."""

    kind: Literal["impossible", "failed"]
    reason: str


def write_trial(trial: Trial, measured: Measured) -> None:
    """Records the trial and what is measured of it, before anything runs."""
    values = {
        "encoder": trial.encoder,
        "projector": trial.projector,
        "varied": dict(trial.varied),
        "seed": trial.align.seed,
        "align": trial.align.model_dump(mode="json"),
        "finetune": trial.finetune.model_dump(mode="json") if trial.finetune else None,
        "measured": measured.as_json(),
    }
    write_text(trial.folder / TRIAL, _dump(values))


def read_trial(folder: Path) -> tuple[Trial, Measured]:
    """What `write_trial` wrote."""
    values = read_json(folder / TRIAL, advice=DELETE)
    finetune = values["finetune"]
    trial = Trial(
        encoder=values["encoder"],
        projector=values["projector"],
        varied=values["varied"],
        align=RunConfig.model_validate(values["align"]),
        finetune=RunConfig.model_validate(finetune) if finetune else None,
        folder=folder,
    )
    return trial, Measured.from_json(values["measured"])


def write_result(folder: Path, result: Result, measured: Measured) -> None:
    """Finishes a trial."""
    write_text(folder / RESULT, _dump({"measured": measured.as_json(), "result": result.as_json()}))
    (folder / FAILURE).unlink(missing_ok=True)


def read_result(folder: Path, measured: Measured | None = None) -> Result | None:
    """The trial's result; None if it is not finished, or something else was measured than is wanted now."""
    if not (folder / RESULT).is_file():
        return None
    values = read_json(folder / RESULT, advice=DELETE)
    if measured is not None and Measured.from_json(values["measured"]).identity() != measured.identity():
        return None
    return Result.from_json(values["result"])


def write_failure(folder: Path, failure: Failure) -> None:
    """Records why the result is missing."""
    write_text(folder / FAILURE, _dump({"kind": failure.kind, "reason": failure.reason}))


def read_failure(folder: Path) -> Failure | None:
    """Why the trial has no result, if it was tried."""
    if not (folder / FAILURE).is_file():
        return None
    values = read_json(folder / FAILURE, advice=DELETE)
    return Failure(values["kind"], values["reason"])


def _dump(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=1, ensure_ascii=False) + "\n"
