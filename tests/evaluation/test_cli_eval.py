"""`llava-npu eval` from the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from llava_npu.cli.eval import eval_
from llava_npu.errors import UserError
from llava_npu.evaluation.benchmarks import available
from support import benchmark_samples as samples
from support.benchmark_samples import mme, pope
from support.evaluation_samples import circular_rows, write_tsv
from support.judge_server import JudgeServer

app = typer.Typer()
app.command("eval")(eval_)


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    return write_tsv(tmp_path / "bench.tsv", circular_rows(groups=2))


@pytest.fixture(scope="module")
def folder(tiny: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    for part in tiny:
        part.save_pretrained(path)
    return path


def test_list() -> None:
    result = run("--list")
    assert result.exit_code == 0
    assert "mmbench_cn" in result.output
    assert "multiple_choice" in result.output
    one = run("pope,mme", "--list")
    assert one.exit_code == 0
    assert "POPE" in one.output
    assert "mmbench" not in one.output


TABLES = (
    "AI2D_TEST",
    "MMBench_DEV_CN",
    "MMBench_TEST_CN",
    "MMBench_TEST_EN",
    "MMMU_DEV_VAL",
    "MMStar",
    "SEEDBench_IMG",
)
SUBMITTED = {
    "docvqa": {"validation_submission.json"},
    "gqa": {"testdev_balanced_predictions.json"},
    "infovqa": {"validation_submission.json"},
    "mmbench": {"mmbench_dev_20230712.xlsx"},
    "mmbench_cn": {"MMBench_DEV_CN.xlsx"},
    "mmbench_cn_test": {"MMBench_TEST_CN.xlsx"},
    "mmbench_test": {"MMBench_TEST_EN.xlsx"},
    "mme": {"count.txt"},
    "mmvet": {"mm-vet.json"},
    "qbench": {"llvisionqa_dev_answers.jsonl"},
    "qbench_cn": {"llvisionqa_zh_dev_answers.jsonl"},
    "seedbench": {"seed_bench.jsonl"},
    "vizwiz": {"vizwiz.json"},
    "vqav2": {"vqav2.json"},
}


@pytest.mark.slow
def test_the_whole_suite_from_one_folder(folder: Path, tmp_path: Path) -> None:
    """Every benchmark but the two for one's own data, in forms of LLaVA's scripts, VLMEvalKit and Hugging Face."""
    data = tmp_path / "data"
    pope(data, [["yes", "no"]])
    mme(data, {"count": 1})
    samples.scienceqa(data, [True, False])
    for make in (samples.textvqa, samples.vqav2, samples.vizwiz, samples.gqa, samples.seedbench, samples.qbench):
        make(data)
    samples.qbench(data, "质衡-问答-验证集.json")
    samples.mmvet(data)
    samples.llavabench(data)
    rows = circular_rows(groups=1)
    for name in TABLES:
        write_tsv(data / f"{name}.tsv", rows if "MMBench" in name else rows[:1])
    write_tsv(data / "mmbench_dev_20230712.tsv", rows)
    row = {"index": "VD_a_b_0_0_0", "question": "Is it?", "answer": "Yes", "image": rows[0]["image"]}
    write_tsv(data / "HallusionBench.tsv", [row], tuple(row))
    samples.hub_datasets(data)

    names = sorted(available().keys() - {"multiple_choice", "vqa_jsonl"})
    required = (",".join(names), "--model", folder, "--data", data, "--output", tmp_path / "out")
    result = run(*required, "--device", "cpu", "--max-new-tokens", 1)
    assert result.exit_code == 0, result.output
    for name in names:
        output = tmp_path / "out" / name
        report = json.loads((output / "report.json").read_text(encoding="utf-8"))
        assert report["num_questions"] > 0
        assert report["num_errors"] == 0
        assert report["provenance"]["settings.max_new_tokens"] == 1
        written = (
            {path.name for path in (output / "submission").iterdir()} if (output / "submission").exists() else set()
        )
        assert written == SUBMITTED.get(name, set()), name
        assert (output / "report.html").is_file()


@pytest.mark.slow
def test_what_the_table_has_no_room_for_stands_below_it_and_differences_are_printed(
    folder: Path, tmp_path: Path
) -> None:
    pope(tmp_path, [["yes", "no"], ["no", "yes"]])
    required = ("pope", "--model", folder, "--data", tmp_path, "--output", tmp_path / "out", "--device", "cpu")
    plain = run(*required, "--max-new-tokens", 2).output
    assert "mean F1: strict " in plain
    assert "answers are read differently" not in plain
    shown = run(*required, "--max-new-tokens", 2, "--differences").output
    assert "POPE: 4 of 4 answers are read differently" in shown  # neither yes nor no is a yes by LLaVA's rule


@pytest.mark.slow
def test_a_judge_from_the_command_line(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVA_NPU_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LLAVA_NPU_JUDGE_KEY", "sk-hidden")
    monkeypatch.setenv("LLAVA_NPU_JUDGE_PRICES", "1,10")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    data = samples.mmvet(tmp_path)
    with JudgeServer(lambda request: "0.5") as server:
        judge = ("--judge-url", server.url, "--judge-model", "judge-1")
        required = ("mmvet", "--model", folder, "--data", data, "--output", tmp_path / "out", "--device", "cpu", *judge)
        result = run(*required, "--max-new-tokens", 3)
    assert result.exit_code == 0, result.output
    assert "3 answers, 0 from the cache; now 300 tokens read and 30 written, cost 0.0006" in " ".join(
        result.output.split()
    )
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer sk-hidden"}
    (overall,) = [
        score
        for score in json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))["scores"]
        if score["level"] == "overall"
    ]
    assert overall["value"] == 0.5
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert not any(b"sk-hidden" in path.read_bytes() for path in written)


@pytest.mark.slow
def test_evaluates_and_goes_on(folder: Path, bench: Path, tmp_path: Path) -> None:
    required = ("mmbench", "--model", folder, "--data", bench, "--output", tmp_path / "out", "--device", "cpu")
    arguments = (*required, "--answer", "likelihood", "--batch-size", 3)
    first = run(*arguments)
    assert first.exit_code == 0, first.output
    assert "circular" in first.output
    stored = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert stored["num_questions"] == 8
    assert stored["provenance"]["settings.candidates"] == "text"
    again = run(*arguments)
    assert again.exit_code == 0
    assert "2 sessions" in again.output
    other = run(*arguments, "--images", "none")
    assert isinstance(other.exception, UserError)
    assert "images: 'given' → 'none'" in str(other.exception)
    assert run(*arguments, "--images", "none", "--fresh").exit_code == 0


@pytest.mark.slow
def test_another_template_is_another_run(folder: Path, bench: Path, tmp_path: Path) -> None:
    required = ("mmbench", "--model", folder, "--data", bench, "--output", tmp_path / "out", "--device", "cpu")
    assert run(*required, "--max-new-tokens", 1, "--template", "llama2").exit_code == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert report["provenance"]["settings.template"] == "llama_2"
    other = run(*required, "--max-new-tokens", 1)
    assert "settings.template: 'llama_2' → 'v1'" in str(other.exception)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "BENCHMARK is missing"),
        (("mmbench",), "--model is missing"),
        (("mmbench", "--model", "x", "--data", "{bench}"), "--output is missing"),
        (("mmbnch", "--model", "x", "--data", "{bench}", "--output", "o"), "Did you mean 'mmbench'"),
        (("mmbench", "--model", "x", "--data", "{bench}", "--output", "o", "--images", "given."), "--images 'given.'"),
        (("mmbench", "--model", "x", "--data", "{bench}", "--output", "o", "--answer", "guess"), "--answer 'guess'"),
        (("mmbench", "--model", "x", "--data", "absent.tsv", "--output", "o"), r"absent\.tsv is not a file"),
        (
            ("pope", "--model", "x", "--data", "{pope}", "--output", "o", "--answer", "likelihood"),
            "pope: question 1 has",
        ),
        (("mmbench", "--model", "x", "--data", "{bench}", "--output", "o", "--template", "v11"), "'v11' is unknown"),
        (("mmbench,mmbench", "--model", "x", "--data", "{bench}", "--output", "o"), "mmbench is there twice"),
        (("mmbench,pope", "--model", "x", "--data", "{bench}", "--output", "o"), "several benchmarks need a folder"),
        (("mmbench", "--model", "x", "--data", "{bench}", "--output", "o", "--judge-url", "x"), "--judge-model"),
        (("mmbench", "--model", "./absent", "--data", "{bench}", "--output", "o", "--device", "cpu"), "absent"),
    ],
)
def test_mistakes(bench: Path, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    if "{pope}" in arguments:
        pope(tmp_path, [["yes", "no"]])
    result = run(*(argument.format(bench=bench, pope=tmp_path) for argument in arguments))
    assert isinstance(result.exception, UserError)
    with pytest.raises(UserError, match=message):
        raise result.exception


def test_help_loads_nothing_heavy() -> None:
    check = "import sys, llava_npu.cli.eval; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", check], text=True).strip() == "[]"
