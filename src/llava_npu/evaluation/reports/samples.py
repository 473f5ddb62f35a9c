"""What a run's scores were computed from, on the disk: so that runs can be compared where their data is not."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from llava_npu.errors import UserError
from llava_npu.evaluation.statistics.accuracy import L2_CATEGORY, OVERALL, STATISTICS, Score, ScoreSample
from llava_npu.files.atomic import write_text

SAMPLES_FILE = "samples.json"
_LEVELS = (OVERALL, L2_CATEGORY)


@dataclass(frozen=True)
class ScoreName:
    """Which score: see `accuracy.Score`."""

    split: str
    level: str
    name: str
    metric: str
    extraction: str


def name_of(score: Score) -> ScoreName:
    return ScoreName(score.split, score.level, score.name, score.metric, score.extraction)


def write_samples(scores: Iterable[Score], folder: Path) -> None:
    """Writes the samples of overall and l2-category scores, atomically."""
    entries = [
        {
            **vars(name_of(score)),
            "statistic": score.sample.statistic,
            "groups": [[*key, *amounts] for key, amounts in score.sample.groups.items()],
        }
        for score in scores
        if score.sample is not None and score.level in _LEVELS
    ]
    write_text(folder / SAMPLES_FILE, json.dumps(entries, ensure_ascii=False) + "\n")


def read_samples(folder: Path) -> dict[ScoreName, ScoreSample]:
    """Reads what `write_samples` wrote.

    Raises:
        UserError: the file is missing or damaged.
    """
    path = folder / SAMPLES_FILE
    if not path.is_file():
        raise UserError(f"{path} is missing. Run the evaluation again with the same arguments: it only scores again.")
    try:
        return dict(_entry(entry) for entry in json.loads(path.read_text(encoding="utf-8")))
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}). Run the evaluation again: it only scores again.") from error


def _entry(entry: dict[str, object]) -> tuple[ScoreName, ScoreSample]:
    name = ScoreName(**{field: str(entry[field]) for field in ScoreName.__dataclass_fields__})
    if entry["statistic"] not in STATISTICS:
        raise ValueError(f"unknown statistic {entry['statistic']!r}")
    groups = entry["groups"]
    assert isinstance(groups, list)
    sums = {(str(stratum), str(group)): tuple(map(float, amounts)) for stratum, group, *amounts in groups}
    return name, ScoreSample(str(entry["statistic"]), sums)
