"""Published tables next to our own evaluations: `llava-npu compare --published`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llava_npu.cli import app
from llava_npu.comparison.folder import EVALUATION
from llava_npu.comparison.published import published_tables, read_published
from llava_npu.errors import UserError
from llava_npu.evaluation.benchmarks import available
from llava_npu.evaluation.run import EvaluationOptions, evaluate
from support.benchmark_samples import mme, pope, vqav2
from support.evaluation_samples import FakeAnswerer


@pytest.mark.parametrize("name", published_tables())
def test_every_table_names_its_source_and_our_benchmarks(name: str) -> None:
    table = read_published(name)
    assert len(table.source) > 20
    assert set(table.benchmarks) <= set(available())
    for model in table.models.values():
        assert model.scores
        for benchmark, score in model.scores.items():
            assert 0 < score < (2800 if benchmark == "mme" else 100)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    yes = FakeAnswerer(lambda question: "Yes")
    options = EvaluationOptions(batch_size=100)
    folder = tmp_path / "runs" / "mine"
    evaluate("pope", pope(tmp_path, [["yes", "no", "no"]] * 3), yes, folder / "pope", options)
    evaluate("mme", mme(tmp_path, {"existence": 2, "code_reasoning": 1}), yes, folder / "mme", options)
    return tmp_path / "runs"


def _compare(*arguments: str) -> str:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["compare", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


def test_next_to_llava(runs: Path, tmp_path: Path) -> None:
    shown = _compare("--published", "llava-1.5/7b", str(runs), "--output", str(tmp_path / "out"))
    table = (tmp_path / "out" / "published.md").read_text(encoding="utf-8")
    heads, _, published, ours = [line.split(" | ") for line in table.splitlines()[2:6]]
    assert [head.strip(" |") for head in heads] == ["", "POPE", "MME (perception)"]
    assert [cell.strip(" |") for cell in published] == ["7b (published)", "85.9", "1510.7"]
    # One of three is a yes: precision 1/3, recall 1. MME's perception: half of the answers right, no image both.
    assert ours[0].strip(" |") == "mine"
    assert ours[1].startswith("50.0")
    assert ours[2].startswith("50.0")
    assert "docs/MODEL_ZOO.md" in shown
    assert "docs/MODEL_ZOO.md" in table


def test_models_of_one_name_keep_their_rows(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "mine", tmp_path / "other" / "mine")
    _compare("--published", "llava-1.5/7b", str(runs), str(tmp_path / "other"), "--output", str(tmp_path / "out"))
    rows = (tmp_path / "out" / "published.md").read_text(encoding="utf-8").splitlines()[5:7]
    assert [row.split(" | ")[0].strip("| ") for row in rows] == ["runs/mine", "other/mine"]
    shutil.copytree(runs / "mine" / "pope", runs / "mine" / EVALUATION / "0-pope")
    with pytest.raises(UserError, match=r"0-pope and .*pope are both of pope and belong to one model"):
        _compare("--published", "llava-1.5/7b", str(runs), "--output", str(tmp_path / "out"))


def test_a_table_of_ones_own(runs: Path, tmp_path: Path) -> None:
    path = tmp_path / "paper.yaml"
    text = "title: Paper\nsource: arXiv 0000.00000, table 1\nbenchmarks: {pope: {title: POPE, metric: accuracy}}\n"
    path.write_text(text + "models: {ours: {setting: as said, scores: {pope: 87}}}\n")
    assert "33.3" in _compare("--published", str(path), str(runs))
    path.write_text(text + "models: {ours: {setting: as said, scores: {gqa: 62}}}\n")
    with pytest.raises(UserError, match=r"models\.ours\.scores\.gqa: this benchmark is not in `benchmarks`"):
        read_published(str(path))


def test_what_is_not_there_is_named(runs: Path, tmp_path: Path) -> None:
    for name, message in {
        "llava15": r"table 'llava15' does not exist. Did you mean 'llava-1.5'\? Tables: honeybee, llava-1.5",
        "llava-1.5/8b": r"llava-1.5 has no setting '8b'.*Its settings:\n  7b: CLIP-L/336",
        "gone.yaml": r"gone.yaml",
    }.items():
        with pytest.raises(UserError, match=message):
            _compare("--published", name, str(runs))
    with pytest.raises(UserError, match="holds no finished evaluation"):
        _compare("--published", "honeybee", str(tmp_path / "pope"))
    evaluate("vqav2", vqav2(tmp_path), FakeAnswerer(lambda question: "2"), tmp_path / "other", EvaluationOptions())
    with pytest.raises(UserError, match=r"LLaVA-NPU \(2024\) has mmbench, mmvet; these folders have vqav2"):
        _compare("--published", "llava-npu", str(tmp_path / "other"))
    with pytest.raises(UserError, match="--published run nothing"):
        _compare("--published", "honeybee", str(runs), "--dry-run")
