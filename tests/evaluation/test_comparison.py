"""Runs side by side: paired tests, tables, files, and what cannot be compared."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from llava_npu.cli import app
from llava_npu.errors import UserError
from llava_npu.evaluation.questions import Question
from llava_npu.evaluation.reports.comparison import RunComparison, compare_runs, read_runs
from llava_npu.evaluation.reports.comparison_report import as_terminal, write_comparison
from llava_npu.evaluation.run import EvaluationOptions, evaluate
from llava_npu.evaluation.statistics.accuracy import ScoreSample
from llava_npu.evaluation.statistics.significance import mcnemar_p, paired_difference
from support.benchmark_samples import mme, pope, vqav2
from support.evaluation_samples import FakeAnswerer, always_a, circular_rows, knows, write_tsv


def sample(*right: float) -> ScoreSample:
    return ScoreSample("ratio", {("", str(number)): (value, 1.0) for number, value in enumerate(right)})


@pytest.mark.parametrize(
    ("only_first", "only_second", "p"),
    # By hand, from binomial coefficients: 2 (1 + 12 + 66) / 2¹² for 2 of 12.
    [(0, 0, 1), (5, 5, 1), (0, 6, 2 / 2**6), (2, 10, 2 * (1 + 12 + 66) / 2**12), (9, 1, 2 * (1 + 10) / 2**10)],
)
def test_mcnemar(only_first: int, only_second: int, p: float) -> None:
    assert mcnemar_p(only_first, only_second) == pytest.approx(p)
    assert mcnemar_p(only_second, only_first) == mcnemar_p(only_first, only_second)


def test_a_difference_that_is_there_and_one_that_is_not() -> None:
    clear = paired_difference(sample(*[0] * 30, *[1] * 30), sample(*[1] * 55, *[0] * 5))
    assert clear is not None
    assert clear.value == pytest.approx(25 / 60)
    assert clear.low < 25 / 60 < clear.high
    assert clear.p < 0.01
    assert clear.mcnemar is not None
    assert (clear.mcnemar.only_first, clear.mcnemar.only_second) == (5, 30)
    assert clear.mcnemar.p < 0.001
    none = paired_difference(sample(1, 0, 1, 0), sample(0, 1, 1, 0))
    assert none is not None
    assert none.value == 0
    assert none.p > 0.5
    assert none.low < 0 < none.high


def test_pairing_matters() -> None:
    """The same totals: where both miss the same questions, a small difference is sure."""
    first = sample(*[1] * 50, *[0] * 50)
    together = paired_difference(first, sample(*[1] * 58, *[0] * 42))
    apart = paired_difference(first, sample(*[0] * 42, *[1] * 58))
    assert together is not None
    assert apart is not None
    assert together.value == pytest.approx(apart.value)
    assert together.p < 0.01 < apart.p
    assert together.high - together.low < apart.high - apart.low


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
@settings(max_examples=30)
def test_exchanging_the_models_turns_the_sign(pairs: list[tuple[bool, bool]]) -> None:
    first, second = sample(*(a for a, _ in pairs)), sample(*(b for _, b in pairs))
    one, other = paired_difference(first, second), paired_difference(second, first)
    assert one is not None
    assert other is not None
    assert one.value == pytest.approx(-other.value)
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low))
    assert one.p == other.p
    assert 0 < one.p <= 1
    same = paired_difference(first, first)
    assert same is not None
    assert (same.value, same.low, same.high, same.p) == (0, 0, 0, 1)


def test_only_groups_of_both_are_compared() -> None:
    found = paired_difference(sample(1, 1, 0), ScoreSample("ratio", {("", "0"): (0, 1), ("", "9"): (1, 1)}))
    assert found is not None
    assert (found.value, found.groups, found.unmatched) == (-1, 1, 3)
    assert paired_difference(sample(1), ScoreSample("ratio", {("", "9"): (1, 1)})) is None


def test_shares_of_more_than_one_have_no_mcnemar() -> None:
    graded = paired_difference(sample(0.3, 1), sample(1, 1))
    assert graded is not None
    assert graded.mcnemar is None


# --- runs on the disk -------------------------------------------------------------------------------------------------


def mostly_knows(question: Question) -> str:
    return knows(question) if int(question.group) % 3 else "B"


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    return write_tsv(tmp_path / "bench.tsv", circular_rows(groups=12))


Make = Callable[[str, Callable[[Question], str]], Path]


@pytest.fixture
def make(bench: Path, tmp_path: Path) -> Make:
    def run(name: str, respond: Callable[[Question], str]) -> Path:
        answerer = FakeAnswerer(respond, fingerprint=f"sha256:{name}")
        evaluate("mmbench", bench, answerer, tmp_path / name, EvaluationOptions(batch_size=100))
        return tmp_path / name

    return run


def compared(*folders: Path) -> RunComparison:
    (comparison,) = compare_runs(read_runs(folders))
    return comparison


@pytest.mark.slow
def test_runs_side_by_side(make: Make, tmp_path: Path) -> None:
    comparison = compared(make("weak", always_a), make("middle", mostly_knows), make("strong", knows))
    assert [run.label for run in comparison.runs] == ["weak", "middle", "strong"]
    row = next(row for row in comparison.rows if (row.name.metric, row.name.level) == ("circular", "overall"))
    assert [score and score.value for score in row.scores] == pytest.approx([0, 8 / 12, 1])
    first, middle, strong = row.differences
    assert first is None
    assert middle is not None
    assert strong is not None
    assert strong.value == 1
    assert strong.mcnemar is not None
    assert (strong.mcnemar.only_first, strong.mcnemar.only_second) == (0, 12)
    assert strong.mcnemar.p == pytest.approx(2 / 2**12)
    Console(file=open(os.devnull, "w"), width=100).print(as_terminal(comparison))  # noqa: SIM115, PTH123


@pytest.mark.slow
def test_comparison_files(make: Make, tmp_path: Path) -> None:
    comparison = compared(make("weak", always_a), make("strong", knows))
    assert write_comparison(comparison, tmp_path / "out") == []
    names = ["comparison.csv", "comparison.html", "comparison.json", "comparison.md"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    with (tmp_path / "out" / "comparison.csv").open(encoding="utf-8", newline="") as file:
        lines = [line for line in csv.DictReader(file) if line["level"] == "overall" and line["extraction"] == "strict"]
    assert [(line["run"], line["metric"], line["value"]) for line in lines[:2]] == [
        ("weak", "circular", "0.0"), ("strong", "circular", "1.0")
    ]  # fmt: skip
    assert lines[0]["difference"] == ""
    assert (lines[1]["difference"], lines[1]["only_this"]) == ("1.0", "12")
    stored = json.loads((tmp_path / "out" / "comparison.json").read_text(encoding="utf-8"))
    assert [run["provenance"]["model"] for run in stored["runs"]] == ["sha256:weak", "sha256:strong"]
    page = (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8")
    assert "+100.0 (+100.0 to +100.0)" in page
    assert "not corrected for their number" in page


def test_scores_that_are_no_shares_are_compared_too(tmp_path: Path) -> None:
    """MME's sums over tasks and POPE's F1: the bootstrap resamples their own statistics."""
    mme(tmp_path, {"count": 5, "position": 4})
    pope(tmp_path, [["yes", "no"] * 3])
    for name in ("mme", "pope"):
        for label, respond in {"knows": knows, "yes": lambda question: "yes"}.items():
            evaluate(name, tmp_path, FakeAnswerer(respond), tmp_path / label / name, EvaluationOptions(page=False))
    comparisons = compare_runs(read_runs([tmp_path / "knows", tmp_path / "yes"]))
    assert [comparison.benchmark for comparison in comparisons] == ["mme", "pope"]
    rows = {
        (row.name.level, row.name.metric): row for c in comparisons for row in c.rows if row.name.extraction == "strict"
    }
    total = rows["overall", "score"].differences[1]
    assert total is not None
    assert total.value == pytest.approx(2 * 0.5 + 0 - 4)  # two tasks: 50 % and none of the pairs, against all of both
    assert total.mcnemar is None
    f1 = rows["overall", "F1"].differences[1]
    assert f1 is not None
    assert f1.value == pytest.approx(2 / 3 - 1)


@pytest.mark.slow
def test_other_data_is_shown_and_not_tested(make: Make, bench: Path, tmp_path: Path) -> None:
    first = make("first", knows)
    write_tsv(bench, circular_rows(groups=11))
    comparison = compared(first, make("second", knows))
    assert all(row.differences == (None, None) for row in comparison.rows)
    assert any("second was asked other questions than first" in note for note in comparison.notes)
    (note,) = write_comparison(comparison, tmp_path / "out")
    assert "No comparison.html" in note
    bench.unlink()
    (note,) = write_comparison(comparison, tmp_path / "out")
    assert "is not a file" in note
    assert "--data" in note


def test_what_differs_beside_the_model_is_said(make: Make, bench: Path, tmp_path: Path) -> None:
    first = make("seeing", knows)
    evaluate("mmbench", bench, FakeAnswerer(always_a), tmp_path / "blind", EvaluationOptions(images="none"))
    comparison = compared(first, tmp_path / "blind")
    assert "blind differs from seeing also in: images." in comparison.notes


def test_labels_tell_runs_apart(make: Make, tmp_path: Path) -> None:
    make("a/mmbench", knows), make("b/mmbench", knows)
    assert [run.label for run in read_runs([tmp_path / "a/mmbench", tmp_path / "b/mmbench"])] == [
        "a/mmbench",
        "b/mmbench",
    ]
    with pytest.raises(UserError, match="the same run is named twice"):
        read_runs([tmp_path / "a", tmp_path / "a"])


def test_what_is_no_finished_run(make: Make, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent is not the folder of an evaluation: .*run\.json"):
        read_runs([tmp_path / "absent"])
    folder = make("run", knows)
    samples = folder / "samples.json"
    kept = samples.read_text(encoding="utf-8")
    for content in ("{", "[{}]", '[{"statistic": "os.system"}]', kept.replace('"ratio"', '"system"')):
        samples.write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match=r"samples\.json is damaged"):
            read_runs([folder])
    samples.unlink()
    with pytest.raises(UserError, match=r"samples\.json is missing. Run the evaluation again"):
        read_runs([folder])
    (folder / "report.json").write_text("{}")
    with pytest.raises(UserError, match=r"report\.json is damaged"):
        read_runs([folder])
    (folder / "report.json").unlink()
    with pytest.raises(UserError, match="not finished"):
        read_runs([folder])


def test_runs_without_scores_say_so(tmp_path: Path) -> None:
    evaluate("vqav2", vqav2(tmp_path), FakeAnswerer(lambda question: "no"), tmp_path / "run")
    result = CliRunner().invoke(app, ["report", str(tmp_path / "run")])
    assert result.exit_code == 0
    assert "VQA v2 (test-dev): no scores (of run)." in result.output


def test_report_command(make: Make, tmp_path: Path) -> None:
    folders = [str(make("weak", always_a)), str(make("strong", knows))]
    result = CliRunner().invoke(app, ["report", *folders, "--output", str(tmp_path / "out")], env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    assert "+100.0" in result.output
    assert (tmp_path / "out" / "comparison.html").is_file()
    alone = CliRunner().invoke(app, ["report", folders[1]], env={"COLUMNS": "160"})
    assert alone.exit_code == 0
    assert "100.0 (100.0–100.0)" in alone.output
