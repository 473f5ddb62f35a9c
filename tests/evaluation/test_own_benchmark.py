"""A benchmark of one's own: one file outside the package, from the command line to the comparison."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from llava_npu.cli.eval import eval_
from llava_npu.cli.report import report
from llava_npu.errors import UserError
from llava_npu.evaluation import benchmarks
from llava_npu.evaluation.benchmarks import load_modules
from support.benchmark_samples import write_jsonl

TOY = '''
"""Parity: is the number in the question even?"""

from pathlib import Path

from llava_npu.evaluation.benchmarks import LOCALLY, Benchmark, Description, register
from llava_npu.evaluation.extraction import yes_no
from llava_npu.evaluation.formats.json_files import read_jsonl
from llava_npu.evaluation.questions import Dataset, Question
from llava_npu.evaluation.statistics.accuracy import hit, tabulate


def read(path):
    records, digest = read_jsonl(path)
    questions = [
        Question(id=r.need("id"), text=r.need("q"), prompt=r.need("q"), answer=r.need("a"), group=r.need("id"))
        for r in records
    ]
    return Dataset(path, digest, tuple(questions))


def parse(question, answer):
    return {"strict": yes_no.strict(answer)}


def score(questions, parsed):
    return tabulate([hit(q, parsed[q.id]["strict"] == q.answer) for q in questions], "accuracy", "strict")


register(
    Benchmark(
        name="toy_parity",
        title="Parity (toy)",
        description=Description("made up", ".jsonl: id, q, a", "CC0", "the question", "accuracy", (LOCALLY,)),
        files=("parity.jsonl",),
        read=read,
        parse=parse,
        score=score,
        review=lambda questions, parsed: [],
        max_new_tokens=4,
        rules={"strict": "the first yes or no"},
    )
)
'''

app = typer.Typer()
app.command("eval")(eval_)
app.command("report")(report)


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests do not see the toy."""
    monkeypatch.setattr(benchmarks, "_REGISTRY", dict(benchmarks.available()))


def test_one_file_is_enough(tmp_path: Path) -> None:
    module = tmp_path / "parity.py"
    module.write_text(TOY)
    write_jsonl(
        tmp_path / "parity.jsonl", [{"id": n, "q": f"Is {n} even?", "a": "no" if n % 2 else "yes"} for n in range(4)]
    )
    answers = write_jsonl(tmp_path / "answers.jsonl", [{"question_id": n, "text": "Yes."} for n in range(4)])
    common = ["--benchmark-module", str(module)]
    listed = CliRunner().invoke(app, ["eval", "toy_parity", "--list", *common])
    assert "Parity (toy)" in listed.output
    arguments = ["toy_parity", "--data", tmp_path, "--predictions", answers, "--output", tmp_path / "run", *common]
    result = CliRunner().invoke(app, ["eval", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [score["value"] for score in written["scores"]] == [0.5]
    assert (tmp_path / "run" / "report.html").is_file()
    compared = CliRunner().invoke(app, ["report", str(tmp_path / "run"), *common])
    assert compared.exit_code == 0, compared.output
    assert "Parity (toy)" in compared.output


@pytest.mark.parametrize(
    ("content", "message"),
    [("x = 1", "registers no benchmark"), ("import nothing_there", "ModuleNotFoundError"), (None, "FileNotFoundError")],
)
def test_modules_that_are_no_benchmarks(tmp_path: Path, content: str | None, message: str) -> None:
    module = tmp_path / f"bad_{len(message)}.py"
    if content is not None:
        module.write_text(content)
    with pytest.raises(UserError, match=f"--benchmark-module .*{message}"):
        load_modules([str(module)])
