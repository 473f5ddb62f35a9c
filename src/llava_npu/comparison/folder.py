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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from llava_npu.comparison.grid import Trial
from llava_npu.comparison.results import Result
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
        values: dict[str, Any] = _MEASURED.dump_python(self, mode="json", exclude_defaults=True)
        return values

    def identity(self) -> dict[str, Any]:
        """All that the result depends on: not where files are, nor how many questions are answered together."""
        values = self.as_json()
        for benchmark, _ in values["benchmarks"]:
            for free in ("data", "batch_size"):
                benchmark.pop(free, None)
        return {**values, "held_out": self.held_out and self.held_out[1], "share_features": None}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Measured:
        return _MEASURED.validate_python(values)


@dataclass(frozen=True)
class Failure:
    """Why a trial has no result: `impossible` parts that do not fit each other, or a run that `failed`."""

    kind: Literal["impossible", "failed"]
    reason: str


_TRIAL, _MEASURED = TypeAdapter(Trial), TypeAdapter(Measured)


def write_trial(trial: Trial, measured: Measured) -> None:
    """Records the trial and what is measured of it, before anything runs."""
    values = _TRIAL.dump_python(trial, mode="json", exclude={"folder"})
    write_text(trial.folder / TRIAL, _dump({**values, "seed": trial.align.seed, "measured": measured.as_json()}))


def read_trial(folder: Path) -> tuple[Trial, Measured]:
    """What `write_trial` wrote."""
    values = read_json(folder / TRIAL, advice=DELETE)
    return _TRIAL.validate_python({**values, "folder": folder}), Measured.from_json(values["measured"])


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
    write_text(folder / FAILURE, _dump(asdict(failure)))


def read_failure(folder: Path) -> Failure | None:
    """Why the trial has no result, if it was tried."""
    return Failure(**read_json(folder / FAILURE, advice=DELETE)) if (folder / FAILURE).is_file() else None


def _dump(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=1, ensure_ascii=False) + "\n"
