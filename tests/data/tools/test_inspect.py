from __future__ import annotations

import html
import io
import json
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from transformers import PreTrainedTokenizerBase
from typer.testing import CliRunner

from llava_npu.cli.data import app
from llava_npu.data.conversation.labels import IMAGE_PLACEHOLDER, encode_conversation
from llava_npu.data.tools.inspect import InspectOptions, inspect_records
from llava_npu.data.tools.inspect_html import tokens
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
    num_faulty = inspect_records(path, tokenizer, InspectOptions(limit=limit), console)
    return num_faulty, console.file.getvalue()  # type: ignore[attr-defined]


def test_a_damaged_picture_is_a_fault(data: Path, llama: PreTrainedTokenizerBase) -> None:
    (data.parent / "a.png").write_bytes(b"no image")
    num_faulty, text = shown(data, llama, color=False, limit=1)
    assert num_faulty == 1
    assert f"image {data.parent / 'a.png'}: not an image in a supported format" in text


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


@pytest.mark.slow
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
        (["--tokenizer", "/nowhere/at/all"], "--tokenizer: /nowhere/at/all does not exist"),
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


def test_page(data: Path, llama: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    inspect_records(data, llama, InspectOptions(limit=9, html=page), Console(file=io.StringIO()))
    text = page.read_text()
    learned = html.unescape("".join(re.findall(r'<span class="learned"[^>]*>(.*?)</span>', text, re.DOTALL)))
    assert "A [red]cat.↵\n猫</s>" in learned
    assert "What is" not in learned
    assert text.count('src="data:image/jpeg;base64,') == 1
    assert '<span class="image" title="image -200">' in text
    assert f"missing image: {data.parent / 'lost.png'}" in text
    assert "the answer is empty" in text
    assert "\x1b" not in text
    assert not list(tmp_path.glob(".page*"))


def test_page_shows_data_as_text(llama: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """What a record says is never markup of the page."""
    bad = "<script>alert('&quot;')</script>"
    turns = [{"from": "human", "value": f"<image>\n{bad}"}, {"from": "gpt", "value": bad}]
    Image.new("RGB", (2, 2)).save(tmp_path / '">x.png')
    path = tmp_path / "train.json"
    path.write_text(json.dumps([{"id": bad, "image": '">x.png', "conversations": turns}]))
    inspect_records(path, llama, InspectOptions(html=tmp_path / "page.html"), Console(file=io.StringIO()))
    text = (tmp_path / "page.html").read_text()
    assert "<script" not in text
    assert '">x.png' not in text


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(answer=st.text(min_size=1, max_size=30).filter(str.strip))
@pytest.mark.parametrize("name", ["llama", "bytes_bpe", "unigram"])
def test_tokens_of_the_page_are_all_of_the_text(name: str, answer: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(name)
    turns = [{"from": "human", "value": "<image>\nq 😀"}, {"from": "gpt", "value": answer}]
    try:
        encoded = encode_conversation(turns, tokenizer, "chatml" if name == "bytes_bpe" else "v1")
    except UserError:  # markup in the answer
        return
    shown = list(tokens(encoded, tokenizer))
    assert [token for _, ids, _ in shown for token in ids] == encoded.input_ids
    behind_image = encoded.input_ids[encoded.input_ids.index(IMAGE_PLACEHOLDER) + 1 :]
    texts = [text for text, _, _ in shown]
    assert "".join(texts[texts.index("⟨image⟩") + 1 :]) == tokenizer.decode(behind_image)


def test_a_record_in_the_middle_and_one_that_is_none(
    data: Path, llama: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    console = Console(file=io.StringIO(), width=200)
    assert inspect_records(data, llama, InspectOptions(limit=1, start=3), console) == 0
    assert "record 3 (id 'odd')" in console.file.getvalue()  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="record 4 does not exist; the last one is 3"):
        inspect_records(data, llama, InspectOptions(start=4))
    data.write_text(json.dumps([{"id": "x"}, *json.loads(data.read_text())]))
    assert inspect_records(data, llama, InspectOptions(limit=2), console) == 1
    assert "has no 'conversations'" in console.file.getvalue()  # type: ignore[attr-defined]
