"""Trials repeated with several seeds: the grid, the statistics, and the tables."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llava_npu.comparison.grid import expand
from llava_npu.comparison.report import ComparisonReport, write_report
from llava_npu.comparison.seeds import ONE_SEED, seeded_table
from llava_npu.comparison.table import TrialRow
from llava_npu.config import validate
from llava_npu.config.comparison import ComparisonConfig
from llava_npu.errors import UserError
from llava_npu.evaluation.reports.samples import write_samples
from llava_npu.evaluation.statistics.accuracy import OVERALL, Score, ScoreSample
from llava_npu.evaluation.statistics.significance import corrected, paired_difference, seeded_differences
from support.comparison_samples import result


def _config(folder: Path, **values: Any) -> ComparisonConfig:
    (folder / "captions.json").write_text("[{}]")
    base = {
        "output": str(folder / "out"),
        "language_model": "lm",
        "encoders": ["clip"],
        "projectors": ["linear", "mlp2x_gelu"],
        "align": {"data": {"path": str(folder / "captions.json")}},
    }
    return validate(ComparisonConfig, {**base, **values}, "comparison.yaml")


def test_every_trial_is_repeated(tmp_path: Path) -> None:
    trials = expand(_config(tmp_path, seeds=3), "comparison.yaml")
    assert [(trial.projector, trial.align.seed) for trial in trials] == [
        (projector, seed) for projector in ("linear", "mlp2x_gelu") for seed in (0, 1, 2)
    ]
    assert len({trial.folder for trial in trials}) == 6
    one = expand(_config(tmp_path, seed=2), "comparison.yaml")[0]
    assert one.folder == trials[2].folder  # the same run, found again under another way to write it
    listed = expand(_config(tmp_path, seeds=[7, 1]), "comparison.yaml")
    assert [trial.varied for trial in listed][:2] == [{"seed": 7}, {"seed": 1}]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seeds": 0}, "from 1 to 1,000"),
        ({"seeds": [1, 1]}, "different whole numbers"),
        ({"seeds": 2, "vary": {"seed": [1]}}, "keep one of them"),
        ({"correction": "bonferroni"}, "holm"),
    ],
)
def test_what_cannot_be(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        _config(tmp_path, **values)


def _sample(right: np.ndarray) -> ScoreSample:
    return ScoreSample("ratio", {("", f"{place:03}"): (float(hit), 1.0) for place, hit in enumerate(right)})


def test_with_one_seed_it_is_the_paired_bootstrap() -> None:
    generator = np.random.default_rng(1)
    first, second = (_sample(generator.random(60) < rate) for rate in (0.4, 0.6))
    (seeded,) = seeded_differences([[first], [second]], [(0, 1)])
    paired = paired_difference(first, second)
    assert seeded is not None
    assert paired is not None
    assert (seeded.value, seeded.low, seeded.high, seeded.p) == (paired.value, paired.low, paired.high, paired.p)


@pytest.mark.parametrize(("questions", "least"), [(1, 1.0), (2, 0.5), (5, 1 / 16)])
def test_few_questions_prove_little(questions: int, least: float) -> None:
    """Drawn with replacement one question never varies; an exact sign test of five gives no less than 1/16."""
    wrong, right = (_sample(np.full(questions, hit)) for hit in (False, True))
    paired = paired_difference(wrong, right)
    (seeded,) = seeded_differences([[wrong, wrong], [right, right]], [(0, 1)])
    assert paired is not None
    assert seeded is not None
    assert paired.p == seeded.p == least
    assert paired.mcnemar is not None
    assert paired.mcnemar.p == least
    assert seeded.detectable is None  # nothing varied: what could be seen is not known


def test_equal_answers_differ_by_nothing() -> None:
    same = _sample(np.arange(40) % 3 == 0)
    (seeded,) = seeded_differences([[same, same], [same]], [(0, 1)])
    assert seeded is not None
    assert (seeded.value, seeded.p, seeded.detectable) == (0, 1, None)


@pytest.mark.slow
def test_seeds_and_questions_both_count() -> None:
    """Of models that differ by luck alone, about 5 % are told apart; without the seeds' part it would be most."""
    generator = np.random.default_rng(2)
    found, ignoring_seeds, seeds, questions = 0, 0, 5, 80
    for _ in range(120):
        difficulty = generator.normal(size=questions)
        models = [
            [_sample(generator.normal(size=questions) < difficulty + generator.normal(scale=0.6)) for _ in range(seeds)]
            for _ in range(2)
        ]
        (together,) = seeded_differences(models, [(0, 1)])
        single = paired_difference(models[0][0], models[1][0])
        found += together.p < 0.05
        ignoring_seeds += single.p < 0.05
    assert 0.01 <= found / 120 <= 0.13
    assert ignoring_seeds / 120 > 0.35


def test_corrections() -> None:
    p = [0.01, 0.04, 0.03, 0.005, 0.5]
    assert corrected(p, "none") == p
    assert corrected(p, "benjamini-hochberg") == pytest.approx([0.025, 0.05, 0.05, 0.025, 0.5])  # step by step too
    assert corrected(p, "holm") == pytest.approx([0.04, 0.09, 0.09, 0.025, 0.5])  # Holm 1979, step by step
    assert corrected([], "holm") == []


def _line(folder: Path, projector: str, seed: int, rate: float) -> TrialRow:
    right = np.random.default_rng(seed).random(40) < rate
    trial = folder / f"{projector}-{seed}"
    evaluation = trial / "evaluation/0-mmbench"
    evaluation.mkdir(parents=True)
    score = Score("circular", "strict", "", OVERALL, OVERALL, right.mean(), 0, 1, 40, _sample(right))
    provenance = {"dataset_sha256": "d" * 64, "model": projector, "images": "given"}
    report = {"benchmark": "mmbench", "title": "MMBench", "data": "", "num_errors": 0, "provenance": provenance}
    (evaluation / "run.json").write_text("{}")
    (evaluation / "report.json").write_text(json.dumps({**report, "scores": [score.facts()]}))
    write_samples([score], evaluation)
    made = replace(result(projector, 144, float(right.mean())), seed=seed)
    made = replace(made, varied={"seed": seed}, benchmarks=(replace(made.benchmarks[0], folder="/gone/0-mmbench"),))
    return TrialRow("CLIP", projector, {"seed": seed}, made, folder=trial)


@pytest.mark.slow
def test_the_report_has_a_row_per_model(tmp_path: Path) -> None:
    lines = [
        _line(tmp_path, projector, seed, rate)
        for projector, rate in (("mlp", 0.3), ("ldp & co", 0.8))
        for seed in (0, 1, 2)
    ]
    lines.append(TrialRow("CLIP", "mlp", {"seed": 3}, None))
    made = seeded_table(lines, "holm")
    assert made is not None
    scores = [made.scores[place]["MMBench"] for place in (0, 1)]
    values = [line.result.benchmarks[0].score.value for line in lines[:3] if line.result]
    assert scores[0].mean == pytest.approx(np.mean(values))
    assert scores[0].deviation == pytest.approx(np.std(values, ddof=1))
    assert scores[0].difference is None
    assert scores[1].relative == pytest.approx(scores[1].mean / scores[0].mean)
    assert scores[1].difference.value == pytest.approx(scores[1].mean - scores[0].mean)
    assert scores[1].difference.p < 0.05
    assert 0 < scores[1].difference.detectable < 0.5

    report = ComparisonReport("Two models", "Made data.", lines, [], "", "", correction="holm")
    page = write_report(report, tmp_path / "out").read_text()
    text = (tmp_path / "out/comparison.md").read_text()
    shown = f"{100 * np.mean(values):.1f} ± {100 * np.std(values, ddof=1):.1f}"
    assert shown in text
    assert shown in page
    assert "3 of 4" in text
    assert "Holm" in text
    assert ONE_SEED not in text
    one = seeded_table([*lines[:3], lines[3]], "none")
    assert one is not None
    assert ONE_SEED in one.about
    latex = (tmp_path / "out/comparison.tex").read_text()
    assert r"CLIP $\cdot$ ldp \& co & 3 & \textbf{" in latex
    assert "Mean and standard deviation over 3 seeds" in latex
    assert "Made data." in latex
    stored = json.loads((tmp_path / "out/comparison.json").read_text())["over_seeds"]
    assert [(each["name"], each["seeds"], each["without_result"]) for each in stored] == [
        ("CLIP · mlp", [0, 1, 2], [3]),
        ("CLIP · ldp & co", [0, 1, 2], []),
    ]


def test_one_seed_makes_no_table(tmp_path: Path) -> None:
    assert seeded_table([_line(tmp_path, "mlp", 0, 0.5)], "none") is None
    assert seeded_table([], "none") is None
