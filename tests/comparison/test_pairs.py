"""Paired differences between trials: what is compared with what, and that the numbers are those of the paired test."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest

from llava_npu.comparison import pairs, table
from llava_npu.comparison.folder import HELD_OUT
from llava_npu.comparison.report import ComparisonReport, write_report
from llava_npu.comparison.results import Result
from llava_npu.comparison.table import TrialRow
from llava_npu.evaluation.reports.samples import write_samples
from llava_npu.evaluation.statistics.accuracy import OVERALL, Score, ScoreSample
from llava_npu.evaluation.statistics.significance import paired_difference
from support.comparison_samples import result

RIGHT = {"mlp2x_gelu": "110100", "resampler": "111101", "ldpv2": "000111"}  # of six questions
LOSSES = {"mlp2x_gelu": (2.0, 4.0, 3.0), "resampler": (1.9, 3.8, 2.7), "ldpv2": (2.5, 3.5, 3.0)}  # of three captions


def _hits(projector: str) -> ScoreSample:
    return ScoreSample("ratio", {("", str(place)): (float(hit), 1.0) for place, hit in enumerate(RIGHT[projector])})


def _losses(projector: str) -> ScoreSample:
    return ScoreSample("ratio", {("", str(place)): (loss, 2.0) for place, loss in enumerate(LOSSES[projector])})


def _line(
    folder: Path, projector: str, encoder: str = "CLIP", dataset: str = "d" * 64, held_out: str = "h"
) -> TrialRow:
    """A finished trial with its evaluations on the disk."""
    trial = folder / f"{encoder}-{projector}"
    evaluation = trial / "evaluation/0-mmbench"
    evaluation.mkdir(parents=True)
    score = Score("circular", "strict", "", OVERALL, OVERALL, 0.5, 0.4, 0.6, 6, _hits(projector))
    loss = Score("held-out loss", "plain", held_out, OVERALL, OVERALL, 2.5, 2.4, 2.6, 3, _losses(projector))
    provenance = {"dataset_sha256": dataset, "model": projector, "images": "given"}
    report = {"benchmark": "mmbench", "title": "MMBench", "data": "", "num_errors": 0, "provenance": provenance}
    (evaluation / "run.json").write_text("{}")
    (evaluation / "report.json").write_text(json.dumps({**report, "scores": [score.facts()]}))
    write_samples([score], evaluation)
    (trial / HELD_OUT).mkdir()
    write_samples([loss], trial / HELD_OUT)
    made = result(projector, 144, 0.5, encoder=encoder)
    elsewhere = "/before/it/was/moved/0-mmbench"  # a comparison's folder can be moved
    made = replace(made, benchmarks=(replace(made.benchmarks[0], folder=elsewhere),))
    return TrialRow(encoder, projector, {}, made, folder=trial)


def test_each_is_compared_with_the_first_of_its_encoder_and_the_firsts_with_the_very_first() -> None:
    def line(encoder: str, projector: str, finished: bool = True, **varied: int) -> TrialRow:
        made: Result | None = result(projector, 144, 0.5, encoder=encoder) if finished else None
        return TrialRow(encoder, projector, varied, made)

    lines = [
        line("A", "impossible", finished=False),
        line("A", "mlp"),
        line("A", "ldp"),
        line("B", "mlp"),
        line("B", "ldp"),
        line("B", "mlp", seed=1),
        line("B", "ldp", seed=1),
    ]
    assert pairs.references(lines) == [None, None, 1, 1, 3, 1, 5]
    assert pairs.references([]) == []


def test_differences_are_those_of_the_paired_test(tmp_path: Path) -> None:
    lines = [_line(tmp_path, projector) for projector in RIGHT]
    found = pairs.differences(lines, [(1, 0), (0, 1), (2, 1)])
    names = list(RIGHT)
    for (of, to), by_measure in found.items():
        hits = paired_difference(_hits(names[to]), _hits(names[of]))
        losses = paired_difference(_losses(names[to]), _losses(names[of]))
        assert by_measure == {"MMBench": hits, "held-out loss": losses}
    better = found[1, 0]["held-out loss"]
    assert better.value == pytest.approx((8.4 - 9.0) / 6)
    assert better.high < 0  # on every caption: separate intervals, which share what is hard, overlap
    assert found[1, 0]["MMBench"].value == pytest.approx(2 / 6)
    assert found[0, 1]["MMBench"].low == pytest.approx(-found[1, 0]["MMBench"].high)


def test_other_questions_other_captions_or_none_are_not_compared(tmp_path: Path) -> None:
    lines = [
        _line(tmp_path, "mlp2x_gelu"),
        _line(tmp_path, "resampler", dataset="e" * 64),
        _line(tmp_path, "ldpv2", held_out="other"),
        TrialRow("CLIP", "run", {}, result("run", 144, 0.5)),  # a run of another command, without answers
    ]
    found = pairs.differences(lines, [(1, 0), (2, 0), (3, 0)])
    assert [sorted(by_measure) for by_measure in found.values()] == [["held-out loss"], ["MMBench"], []]


@pytest.mark.slow
def test_reports_hold_them_for_people_and_programs(tmp_path: Path) -> None:
    lines = [_line(tmp_path, "mlp2x_gelu"), _line(tmp_path, "resampler"), _line(tmp_path, "ldpv2", encoder="SigLIP")]
    page = write_report(ComparisonReport("T", "", lines, [], "", ""), tmp_path / "report")
    rows = (tmp_path / "report/comparison.md").read_text(encoding="utf-8").split("## Pair by pair")[1]
    assert "| CLIP | resampler | CLIP · mlp2x_gelu | +33.3 (±0.0 to +66.7), p = " in rows
    assert "−0.10 (" in rows
    assert "| SigLIP | ldpv2 | CLIP · mlp2x_gelu | " in rows

    first, second, _ = csv.DictReader(io.StringIO((tmp_path / "report/comparison.csv").read_text(encoding="utf-8")))
    assert first["compared_with"] == ""
    assert second["compared_with"] == "CLIP · mlp2x_gelu"
    assert float(second["held_out_loss_difference"]) == pytest.approx(-0.1)

    trials = json.loads((tmp_path / "report/comparison.json").read_text(encoding="utf-8"))["trials"]
    assert trials[0]["compared"] is None
    assert trials[1]["compared"]["differences"]["MMBench"]["mcnemar"] == {"only_first": 0, "only_second": 2, "p": 0.5}

    shown = page.read_text(encoding="utf-8").split("const paired = ")[1].split(", projectors = ")[0]
    paired = json.loads(shown)
    assert paired["references"] == [None, 0, 0]
    for measure in paired["measures"]:
        assert sorted(measure["pairs"]) == ["0-1", "0-2", "1-0", "1-2", "2-0", "2-1"]
    assert paired["measures"][0]["pairs"]["1-0"][0] == pytest.approx(100 / 3)


@pytest.mark.slow
def test_of_very_many_models_the_page_holds_differences_to_references_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llava_npu.comparison.report._PAIRED_ON_PAGE", 2)
    lines = [_line(tmp_path, projector) for projector in RIGHT]
    page = write_report(ComparisonReport("T", "", lines, [], "", ""), tmp_path / "report").read_text(encoding="utf-8")
    paired = json.loads(page.split("const paired = ")[1].split(", projectors = ")[0])
    assert [sorted(measure["pairs"]) for measure in paired["measures"]] == [["1-0", "2-0"]] * 2
    assert page.count("<option") == 1  # no other can be chosen


@pytest.mark.slow
def test_nothing_to_compare_is_no_section(tmp_path: Path) -> None:
    lines = [_line(tmp_path, "mlp2x_gelu")]
    assert table.differences_as_markdown(lines, pairs.against_references(lines)) == ""
    page = write_report(ComparisonReport("T", "", lines, [], "", ""), tmp_path / "report")
    assert "Pair by pair" not in page.read_text(encoding="utf-8")
