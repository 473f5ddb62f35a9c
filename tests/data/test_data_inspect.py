from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console
from transformers import PreTrainedTokenizerBase
from typer.testing import CliRunner

from llava_npu.cli.data import app
from llava_npu.data import inspect_records
from llava_npu.errors import UserError


@pytest.fixture
def data(tmp_path: Path) -> Path:
    def record(name: str, question: str, answer: str, **image: str) -> dict[str, object]:
        return {
            "id": name,
            "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}],
            **image,
        }

    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    records = [
        record("good", "<image>\nWhat is [b]this[/b]?", "A [red]cat.\n猫", image="a.png"),
        record("lost", "<image>\nq", "a", image="lost.png"),
        record("empty", "q", ""),
        record("odd", "q", "\x1b[31mred"),
    ]
    path = tmp_path / "train.json"
    path.write_text(json.dumps(records))
    return path


def shown(path: Path, tokenizer: PreTrainedTokenizerBase, *, color: bool, limit: int = 9) -> tuple[int, str]:
    console = Console(
        file=io.StringIO(),
        width=200,
        force_terminal=color,
        color_system="truecolor" if color else None,
        highlight=False,
    )
    num_faulty = inspect_records(path, tokenizer, "v1", limit=limit, console=console)
    return num_faulty, console.file.getvalue()  # type: ignore[attr-defined]


def test_plain_text(data: Path, llama: PreTrainedTokenizerBase) -> None:
    num_faulty, text = shown(data, llama, color=False)
    assert "record 0 (id 'good')" in text
    assert "USER: <image>\nWhat is [b]this[/b]? ASSISTANT:⟦ A [red]cat.↵\n猫</s>⟧" in text
    assert f"missing image: {data.parent / 'lost.png'}" in text
    assert "record 2 (id 'empty')" in text
    assert "the answer is empty" in text
    assert "\x1b" not in text
    assert "⟦ \\x1b[31mred</s>⟧" in text
    assert num_faulty == 2
    assert "4 of 4 records shown, 2 of them faulty; template v1" in text


def test_color(data: Path, llama: PreTrainedTokenizerBase) -> None:
    _, text = shown(data, llama, color=True, limit=1)
    assert "⟦" not in text
    assert "\x1b[1;32m A [red]cat.↵" in text
    assert "1 of 4 records shown, 0 of them faulty" in text


def test_command(data: Path, llama: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    llama.save_pretrained(tmp_path / "tokenizer")
    command = ["inspect", str(data), "--tokenizer", str(tmp_path / "tokenizer"), "--template", "vicuna_v1"]
    good = CliRunner().invoke(app, [*command, "--limit", "1"])
    assert (good.exit_code, "⟦ A [red]cat." in good.output) == (0, True)
    faulty = CliRunner().invoke(app, command)
    assert (faulty.exit_code, "2 of them faulty" in faulty.output) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokenizer", "/nowhere/at/all"], "--tokenizer /nowhere/at/all: no tokenizer"),
        (["--template", "v7"], "template 'v7' is unknown"),
    ],
)
def test_command_errors(
    arguments: list[str], message: str, data: Path, llama: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    llama.save_pretrained(tmp_path / "tokenizer")
    defaults = ["inspect", str(data), "--tokenizer", str(tmp_path / "tokenizer")]
    result = CliRunner().invoke(app, [*defaults, *arguments])
    assert isinstance(result.exception, UserError)
    assert message in str(result.exception)
