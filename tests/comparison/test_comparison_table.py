"""Tables, the frontier and the page, of results with known numbers."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest

from llava_npu.comparison import pareto, radar, table
from llava_npu.comparison.examples import ExampleQuestion
from llava_npu.comparison.folder import Failure
from llava_npu.comparison.report import ComparisonReport, write_report
from llava_npu.comparison.results import Result
from llava_npu.comparison.table import TrialRow
from support.comparison_samples import result

RESULTS = [
    result("mlp2x_gelu", 576, 0.64, 300),
    result("resampler", 144, 0.60, 120),
    result("ldpv2", 144, 0.62, 130),
    result("worse | dearer", 576, 0.50, 310),
    result("adaptive_pool", 36, 0.62, 100),
]
LINES = [
    *(TrialRow(each.encoder, each.projector, each.varied, each) for each in RESULTS),
    TrialRow("SigLIP", "tokenpacker", {}, None, Failure("impossible", "27 is not divisible by 2")),
    TrialRow("SigLIP", "linear", {}, None),
]


def test_the_frontier_holds_what_nothing_beats_at_the_same_price_or_less() -> None:
    benchmark, loss = pareto.measures(RESULTS)
    found = pareto.frontier(RESULTS, benchmark, pareto.AXES[0].cost)
    # ldpv2 scores no more than adaptive_pool does with a quarter of the tokens.
    assert [each.projector for each in found] == ["adaptive_pool", "mlp2x_gelu"]
    # Of a loss, less is better; all have the same, so the cheapest wins.
    assert [each.projector for each in pareto.frontier(RESULTS, loss, pareto.AXES[0].cost)] == ["adaptive_pool"]


def _over(scores: dict[str, float], projector: str) -> Result:
    """A result with these benchmarks in place of its one."""
    one = result(projector, 144, 0.5)
    (benchmark,) = one.benchmarks
    several = (
        replace(benchmark, label=name, score=replace(benchmark.score, value=value)) for name, value in scores.items()
    )
    return replace(one, benchmarks=tuple(several))


ON_SEVERAL = [
    _over({"A": 0.5, "B": 0.2, "C": 0.6}, "low"),
    _over({"A": 0.7, "B": 0.4, "C": 0.6}, "high"),
    _over({"A": 0.6, "B": 0.4, "C": 0.6}, "middle"),
    _over({"A": 0.9, "B": 0.9}, "without"),
]


def test_the_radar_shows_models_with_every_benchmark_from_the_lowest_score_to_the_highest() -> None:
    chosen = radar.choose(ON_SEVERAL)
    assert chosen is not None
    assert [model.projector for model in chosen.models] == ["high", "middle", "low"]
    assert chosen.left_out == (ON_SEVERAL[3].name,)
    first, second, third = chosen.benchmarks
    assert chosen.places(first) == pytest.approx([1, 0.575, 0.15])
    assert chosen.places(second) == pytest.approx([1, 1, 0.15])
    assert chosen.places(third) == [1, 1, 1]  # all have the same
    panel = radar.draw(chosen, ON_SEVERAL).axes[0]
    outlines = {line.get_gid(): list(line.get_ydata()) for line in panel.lines}
    assert outlines["radar-1"] == pytest.approx([0.575, 1, 1, 0.575])
    assert [label.get_text().split("\n")[1] for label in panel.get_xticklabels()] == [
        "50.0–70.0 %", "20.0–40.0 %", "60.0–60.0 %"
    ]  # fmt: skip
    assert radar.choose(ON_SEVERAL[:1]) is None
    assert radar.choose(RESULTS) is None  # one benchmark


@pytest.mark.slow
def test_the_page_shows_the_radar(tmp_path: Path) -> None:
    lines = [TrialRow(each.encoder, each.projector, each.varied, each) for each in ON_SEVERAL]
    page = write_report(ComparisonReport("T", "", lines, [], "", ""), tmp_path).read_text(encoding="utf-8")
    assert "All benchmarks at once" in page
    assert 'id="radar-2"' in page
    assert (tmp_path / "radar.png").read_bytes().startswith(b"\x89PNG")


def test_points_of_equally_many_tokens_stay_in_the_plot_and_apart_from_others() -> None:
    many = [result(f"p{number}", 4 if number < 14 else 6, 0.5) for number in range(28)]
    figure = pareto.draw(many, pareto.measures(many)[0])
    panel = figure.axes[0]
    left, right = panel.get_xlim()
    points = {line.get_gid(): line.get_xdata()[0] for line in panel.lines if (line.get_gid() or "").endswith("-0")}
    assert len(points) == len(many)
    assert all(1.05 * left < x < right / 1.05 for x in points.values())
    places = [points[f"point-{number}-0"] for number in range(28)]
    assert places == sorted(places)  # none of those with 4 tokens stands among those with 6


def test_markdown_has_every_number_and_every_reason() -> None:
    text = table.as_markdown(LINES)
    head, _, first, *_ = text.splitlines()
    assert "| MMBench, % |" in head
    for cell in (
        "mlp2x_gelu",
        "576",
        "21.00",
        "64.0 (59.0–69.0)",
        "2.25",
        "5,000",
        "2.50 (2.40–2.60)",
        "300 (295–305)",
    ):
        assert cell in first
    assert f"{(350 + 24 + 576 * 13):.1f}" in first  # GFLOP
    assert r"worse \| dearer" in text
    assert "- SigLIP · tokenpacker: impossible: 27 is not divisible by 2" in text
    assert "- SigLIP · linear: not run yet" in text


def test_csv_has_plain_units() -> None:
    rows = list(csv.DictReader(io.StringIO(table.as_csv(LINES, [None] * len(LINES)))))
    assert len(rows) == len(LINES)
    assert float(rows[0]["MMBench"]) == 0.64
    assert rows[0]["projector_parameters"] == "21000000"
    assert rows[0]["first_token_ms_low"] == "295"
    assert rows[-2]["outcome"] == "impossible: 27 is not divisible by 2"


def test_a_result_survives_its_file() -> None:
    assert Result.from_json(json.loads(json.dumps(RESULTS[0].as_json()))) == RESULTS[0]


@pytest.mark.slow
def test_the_report_is_complete_and_needs_nothing_else(tmp_path: Path) -> None:
    examples = [
        ExampleQuestion("1", "data:image/jpeg;base64,AAAA", "What <b>is</b> it?", {"A": "a cat", "B": "a dog"}, "A")
    ]
    page = write_report(
        ComparisonReport("T & T", "Tiny <data>.", LINES, examples, "seed: 0\n", "llava-npu compare x"), tmp_path
    )
    text = page.read_text(encoding="utf-8")
    assert "What &lt;b&gt;is&lt;/b&gt; it?" in text
    assert "a cat &lt;on&gt; a sofa" in text
    assert "27 is not divisible by 2" in text
    assert text.count('id="point-0-') == 2 * 2 * len(
        pareto.AXES
    )  # with its interval; of two measures against two prices
    assert not any(mark in text for mark in ('src="http', 'href="http', "@import", "url(http"))
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")
    cells = json.loads((tmp_path / "comparison.json").read_text())["trials"]
    assert [cell["outcome"] for cell in cells[-2:]] == ["impossible: 27 is not divisible by 2", "not run yet"]


@pytest.mark.slow
def test_a_grid_of_encoders_is_shown_as_a_map(tmp_path: Path) -> None:
    grid = [result(name, 144, score, encoder=encoder) for name, encoder, score in (
        ("mlp", "CLIP", 0.5), ("ldp", "CLIP", 0.7), ("mlp", "SigLIP", 0.6)
    )]  # fmt: skip
    lines = [TrialRow(each.encoder, each.projector, each.varied, each) for each in grid]
    page = write_report(ComparisonReport("T", "", lines, [], "", ""), tmp_path / "grid").read_text(encoding="utf-8")
    cells = page.split('<table class="matrix">')[1].split("</table>")[0]
    assert cells.count("<td") == 4
    assert "–</td>" in cells  # ldp with SigLIP was not run
    assert "<b>70.0</b> <small>65.0–75.0</small>" in cells
    assert cells.index("--shade:6%") < cells.index("--shade:33%") < cells.index("--shade:60%")

    lines[0] = TrialRow("CLIP", "mlp", {"seed": 1}, replace(grid[0], varied={"seed": 1}))  # two models in one place
    lines.append(TrialRow("CLIP", "mlp", {"seed": 2}, replace(grid[0], varied={"seed": 2})))
    page = write_report(ComparisonReport("T", "", lines, [], "", ""), tmp_path / "varied").read_text(encoding="utf-8")
    assert "At a glance" not in page


def test_a_report_without_any_result_is_still_one(tmp_path: Path) -> None:
    page = write_report(ComparisonReport("nothing yet", "", LINES[-2:], [], "", ""), tmp_path)
    assert "not run yet" in page.read_text(encoding="utf-8")
    assert not (tmp_path / "pareto.png").exists()
    assert not (tmp_path / "radar.png").exists()
