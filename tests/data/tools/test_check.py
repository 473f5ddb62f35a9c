from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import PreTrainedTokenizerBase
from typer.testing import CliRunner

from llava_npu.cli.data import app
from llava_npu.data.conversation.labels import encode_conversation
from llava_npu.data.records import open_records
from llava_npu.data.tools.check import CheckOptions, CheckReport, _repetitions, check_records
from llava_npu.errors import UserError


def record(name: str, question: str = "q", answer: str = "a", **fields: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": name, "conversations": turns, **fields}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    Image.new("RGB", (2, 2)).save(tmp_path / "good.png")
    (tmp_path / "junk.png").write_bytes(b"junk")
    (tmp_path / "out.png").symlink_to("/etc/hostname")
    entries = [
        record("good", "<image>", image="good.png"),
        record("gone", "<image>", "b", image="gone.png"),
        record("junk", "<image>", "c", image="junk.png"),
        record("junk again", "<image>", "d", image="junk.png"),
        record("out", "<image>", "e", image="out.png"),
        record("abs", "<image>", "f", image="/etc/hostname"),
        record("count", "<image><image>", "g", image="good.png"),
        record("empty", "h", ""),
        {"id": "alone", "conversations": [{"from": "human", "value": "i"}]},
        record("markup", "j </s>"),
        record("long", "k", "word " * 200),
        record("longer", "word " * 200, "m"),
        record("copy", "<image>", image="good.png"),
        record("good", "n", "n"),
    ]
    lines = [json.dumps(entry) for entry in entries]
    lines.insert(5, '{"id": "torn", "conv')
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(lines))
    return path


def counts(report: CheckReport) -> dict[str, int]:
    return {kind: found.count for kind, found in report.findings.items()}


BEFORE_ENCODING = {
    "image missing": 1,
    "image unreadable": 2,
    "image path refused": 2,
    "image count": 1,
    "empty or unanswerable": 2,
    "unreadable record": 1,
    "duplicate sample": 1,
    "duplicate id": 1,
}


def test_without_a_tokenizer(path: Path) -> None:
    report = check_records([open_records(path)], CheckOptions())
    assert counts(report) == BEFORE_ENCODING
    assert (report.num_records, report.num_bad, report.longest) == (15, 9, None)
    (missing,) = report.findings["image missing"].examples
    assert missing.startswith(f"{path}:record 1 (line 2) (id 'gone'): image {path.parent / 'gone.png'} does not exist")
    (twice,) = report.findings["duplicate sample"].examples
    assert "(id 'copy') is the same as" in twice
    assert twice.endswith("record 0 (line 1)")


@pytest.fixture
def tokenizer_folder(llama: PreTrainedTokenizerBase, tmp_path: Path) -> str:
    llama.save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


@pytest.mark.slow
def test_with_a_tokenizer(path: Path, tokenizer_folder: str) -> None:
    options = CheckOptions(tokenizer=tokenizer_folder, max_length=100, image_tokens=10, examples=1)
    report = check_records([open_records(path)], options)
    assert counts(report) == {**BEFORE_ENCODING, "not encodable": 1, "text cut off": 1, "answers cut off": 1}
    assert report.num_bad == 11
    assert report.longest is not None
    assert 240 < report.longest < 260
    assert len(report.findings["image unreadable"].examples) == 1
    assert "(id 'long'): 2" in report.findings["text cut off"].examples[0]
    # 40 image tokens more, and the shortest sample with an image is too long as well.
    longer = check_records(
        [open_records(path)], CheckOptions(images="ignore", tokenizer=tokenizer_folder, max_length=100, image_tokens=90)
    )
    assert counts(longer)["text cut off"] + counts(longer)["answers cut off"] > 2


@pytest.mark.slow
def test_workers_and_sources_change_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava_npu.data.tools.check._CHUNK", 4)
    alone = check_records([open_records(path)] * 2, CheckOptions())
    shared = check_records([open_records(path)] * 2, CheckOptions(), workers=2)
    assert shared == alone
    assert counts(alone)["duplicate sample"] == 1 + 11  # each entry that is a record, once more
    assert counts(alone)["image unreadable"] == 4
    assert counts(alone)["duplicate id"] == 1  # within a file; here the second file's are all whole duplicates


def test_progress_and_images_choice(path: Path) -> None:
    done: list[int] = []
    report = check_records([open_records(path)], CheckOptions(images="exist"), report=done.append)
    assert sum(done) == 15
    assert "image unreadable" not in counts(report)
    assert counts(report)["image missing"] == 1
    assert "image missing" not in counts(check_records([open_records(path)], CheckOptions(images="ignore")))


def test_unknown_template(path: Path) -> None:
    with pytest.raises(UserError, match="template 'v9' is unknown"):
        check_records([open_records(path)], CheckOptions(template="v9"))


@given(st.lists(st.integers(0, 6), min_size=1, max_size=40))
def test_repetitions(values: list[int]) -> None:
    places, firsts = _repetitions(np.array(values, dtype=np.uint64))
    expected = [(i, values.index(value)) for i, value in enumerate(values) if value and values.index(value) < i]
    assert list(zip(places.tolist(), firsts.tolist(), strict=True)) == expected


def test_command(path: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["check", str(path), "--json", str(tmp_path / "report.json"), "--examples", "1"])
    assert result.exit_code == 1
    assert "9 of them cannot be trained on" in result.output
    assert "… and 1 more" in result.output
    assert "not checked: lengths, and what the template refuses (give --tokenizer)" in result.output
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["records"], report["bad_records"]) == (15, 9)
    assert report["findings"]["image unreadable"]["count"] == 2
    assert len(report["findings"]["image unreadable"]["examples"]) == 1
    assert report["findings"]["duplicate id"]["severity"] == "warning"


def test_command_on_good_data(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text(json.dumps([record("a"), record("b", "q", "b"), record("a", "q", "c")]))
    result = CliRunner().invoke(app, ["check", str(tmp_path / "train.json")])
    assert result.exit_code == 0
    assert "duplicate id" in result.output  # a warning
    assert "none of them bad" in result.output


@pytest.mark.slow
def test_command_on_a_training_configuration(path: Path, tokenizer_folder: str, tmp_path: Path) -> None:
    config = f"""
        output: x
        stage: finetune
        model: {{vision_tower: a, language_model: {tokenizer_folder}}}
        data: {{sources: [{{path: {path}}}, {{path: {path}, limit: 2}}], template: v1, max_length: 100}}
    """
    (tmp_path / "run.yaml").write_text(config)
    result = CliRunner().invoke(app, ["check", str(tmp_path / "run.yaml")])
    assert result.exit_code == 1
    assert "30 records" in result.output
    assert "answers cut off" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "look"], "--images 'look' is unknown"),
        (["--tokenizer", "/nowhere"], "--tokenizer: /nowhere does not exist"),
        (["--json", "/proc/report.json"], "/proc/report.json: cannot be written"),
    ],
)
def test_command_errors(arguments: list[str], message: str, path: Path) -> None:
    result = CliRunner().invoke(app, ["check", str(path), *arguments])
    assert isinstance(result.exception, UserError)
    assert message in str(result.exception)


@pytest.mark.parametrize("template", ["v1", "llama_2", "mistral", "chatml", "plain", "tokenizer"])
@pytest.mark.parametrize("answer", ["", " ", "\n\t ", "\u3000"])
def test_blank_answers_are_bad_where_training_refuses_them(
    tmp_path: Path, template: str, answer: str, bytes_bpe: PreTrainedTokenizerBase
) -> None:
    path = tmp_path / "train.json"
    path.write_text(json.dumps([record("blank", "q" if template != "plain" else "<image>", answer)]))
    records = open_records(path)
    try:
        encode_conversation(records[0].conversations, bytes_bpe, template)
        refused = False
    except UserError:
        refused = True
    report = check_records([records], CheckOptions("none", template))
    assert (report.num_bad > 0) is refused
