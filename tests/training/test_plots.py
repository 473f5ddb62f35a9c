"""The run's image and page, drawn from its metrics."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from llava_npu.config import RunConfig
from llava_npu.training import trainer as loop
from llava_npu.training.monitoring import plots
from llava_npu.training.monitoring.metrics import read_metrics
from llava_npu.training.monitoring.plots import MOST_POINTS, Plotter, draw_plots


def _write_metrics(folder: Path, steps: int) -> None:
    lines = (
        {"step": n, "loss": 5.0 / n if n != 3 else float("nan"), "learning_rate": 1e-3, "tokens_per_second": 1e4}
        | {"mfu": None, "learning_rates": {"projector": 1e-3}}
        for n in range(1, steps + 1)
    )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_picture_and_page(tmp_path: Path) -> None:
    folder = tmp_path / "a <run> & more"
    folder.mkdir()
    _write_metrics(folder, 2 * MOST_POINTS + 7)
    draw_plots(folder)
    with Image.open(folder / "loss.png") as picture:
        assert picture.width > 500
    page = (folder / "loss.html").read_text()
    assert "<h1>a &lt;run&gt; &amp; more</h1>\n<svg" in page
    assert f"<tr><td>step</td><td>{2 * MOST_POINTS + 7:,}</td></tr>" in page
    assert len(page) < 500_000  # not a point for each step
    assert not list(folder.glob(".*"))


def test_nothing_is_drawn_of_nothing(tmp_path: Path) -> None:
    draw_plots(tmp_path)
    assert not list(tmp_path.iterdir())


def test_lines_that_hold_something_else_are_left_out(tmp_path: Path) -> None:
    _write_metrics(tmp_path, 3)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4}\n{"step": 5, "loss": "x", "learning_rate": 1e-3, "tokens_per_second": 1e4}\n')
    draw_plots(tmp_path)
    assert "<td>step</td><td>3</td>" in (tmp_path / "loss.html").read_text()


def test_drawing_is_seldom(tmp_path: Path) -> None:
    _write_metrics(tmp_path, 3)
    picture = tmp_path / "loss.png"
    times = iter([0.0, 4.9, 5.0, 7.0, 206.9, 207.0, 207.1])  # a drawing of two seconds: not again for 200
    plotter = Plotter(tmp_path, lambda: next(times))
    drawn = []
    for _ in range(4):
        plotter.draw_if_due()
        drawn.append(picture.exists())
        picture.unlink(missing_ok=True)
    assert drawn == [False, True, False, True]


def test_a_run_draws_itself(make_run: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []

    def count(folder: Path) -> None:
        drawn.append(len(read_metrics(folder)))
        draw_plots(folder)

    monkeypatch.setattr(plots, "FIRST_SECONDS", 0.0)
    for module in (plots, loop):
        monkeypatch.setattr(module, "draw_plots", count)
    run = make_run(max_steps=3)
    loop.train(run)
    assert drawn[0] == 1  # as it goes
    assert drawn[-1] == 3  # and what it came to
    assert "<tr><td>step</td><td>3</td></tr>" in (run.output_path / "loss.html").read_text()
    assert (run.output_path / "loss.png").stat().st_size > 10_000
