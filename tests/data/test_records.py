from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from llava_npu.data.records import fingerprint, load_records
from llava_npu.errors import UserError

GOOD: dict[str, Any] = {
    "id": "0017",
    "image": "coco/17.jpg",
    "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}],
}


def write(folder: Path, content: Any, name: str = "train.json") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def with_turns(*pairs: tuple[str, str]) -> dict[str, Any]:
    return {"id": "x", "conversations": [{"from": role, "value": text} for role, text in pairs]}


def test_reads_json(tmp_path: Path) -> None:
    text_only = with_turns(("human", "Hi"), ("gpt", "Hello"))
    two = {**with_turns(("human", "<image><image>"), ("gpt", "b")), "image": ["a.png", "b.png"], "id": 5}
    path = write(tmp_path, [GOOD, text_only, two])
    records = load_records(path, tmp_path / "images")
    assert [record.id for record in records] == ["0017", "x", "5"]
    assert [record.images for record in records] == [("coco/17.jpg",), (), ("a.png", "b.png")]
    assert records[0].image_paths == (tmp_path / "images" / "coco" / "17.jpg",)
    assert [(turn.role, turn.text) for turn in records[0].conversations] == [
        ("human", "<image>\nWhat?"),
        ("gpt", "A cat."),
    ]
    assert records[2].origin == f"{path}:record 2"
    assert records[2].name == f"{path}:record 2 (id '5')"


def test_images_lie_beside_the_file_by_default(tmp_path: Path) -> None:
    assert load_records(write(tmp_path, [GOOD]))[0].image_paths == (tmp_path / "coco" / "17.jpg",)


def test_reads_jsonl_with_blank_lines_and_line_separators(tmp_path: Path) -> None:
    """U+2028 may stand in a JSON string; only a newline ends a line."""
    odd = with_turns(("human", "a\u2028b"), ("gpt", "c"))
    path = write(tmp_path, "\n".join(["", json.dumps(GOOD), "", json.dumps(odd, ensure_ascii=False), ""]), "t.jsonl")
    records = load_records(path)
    assert records[1].conversations[0].text == "a\u2028b"
    assert records[1].origin == f"{path}:record 1 (line 4)"


def test_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps([GOOD]).encode())
    assert len(load_records(path)) == 1


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ('[{"id": 1},\n {"id": }]', "a.json", "not valid JSON at line 2, column 9"),
        ("", "a.json", "not valid JSON at line 1, column 1"),
        ('{"id": 1}\n{"id": 2}', "a.json", "one object per line, name it .jsonl"),
        (f'{json.dumps(GOOD)}\n{{"id": ', "a.jsonl", "not valid JSON at line 2, column"),
        ("[" * 100_000, "a.json", "not a JSON list of records"),
        (f"[{'9' * 5000}]", "a.json", "not a JSON list of records"),
        (GOOD, "a.json", "the file holds .* not a list of records"),
        ([], "a.json", "no records in this file"),
        ("\n\n", "a.jsonl", "no records in this file"),
    ],
)
def test_malformed_files(content: Any, name: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, content, name)
    with pytest.raises(UserError, match=rf"^{path}.*{message}"):
        load_records(path)


def test_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_bytes(b'[{"id": "caf\xe9"}]')
    with pytest.raises(UserError, match="not UTF-8 at byte 12"):
        load_records(path)


@pytest.mark.parametrize("name", ["missing.json", "."])
def test_unreadable(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read the data file"):
        load_records(tmp_path / name)
    with pytest.raises(UserError, match="cannot read the data file"):
        fingerprint(tmp_path / name)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("hello", " is 'hello'; a record is an object"),
        ({"id": {}, "conversations": []}, r"'id' is \{\} \(dict\)"),
        ({"id": "x"}, r"\(id 'x'\) has no 'conversations'"),
        ({"id": "x", "conversation": []}, "Did you mean 'conversation'"),
        ({"id": "x", "conversations": {}}, r"'conversations' is \{\} \(dict\), not a list"),
        ({"id": "x", "conversations": []}, "'conversations' is empty"),
        (with_turns(("human", "a"), ("human", "b")), r"conversations\[1\].from is 'human', as in the turn before"),
        (with_turns(("human", "a"), ("bot", "b")), r"conversations\[1\].from is 'bot'; allowed are 'human' and 'gpt'"),
        (with_turns(("human", "a")), "no gpt turn"),
        (with_turns(("human", "a"), ("gpt", "<image>")), "an answer contains '<image>'"),
        (with_turns(("human", " "), ("gpt", "a")), "a human turn is empty"),
        (with_turns(("human", "a"), ("gpt", "\ud83d")), r"conversations\[1\].value: character 0 is a lone surrogate"),
        (with_turns(("human", "<image>"), ("gpt", "a")), "0 image.s. but 1 '<image>'.*add the 'image' field"),
        ({**GOOD, "image": ["a.jpg", "b.jpg"]}, "2 image.s. but 1 '<image>'.*one '<image>' per image"),
        ({**with_turns(("human", "q"), ("gpt", "a")), "image": "a.jpg"}, "1 image.s. but 0 '<image>'.*start the first"),
        ({**GOOD, "image": 3}, r"'image' is 3 \(int\)"),
        ({**GOOD, "image": ""}, "'image' is ''"),
        ({**GOOD, "image": [["a.jpg"]]}, "'image' is"),
        ({**GOOD, "images": ["a.jpg"]}, "has both 'image' and 'images'; keep one"),
        ({**GOOD, "image": "/etc/passwd"}, "absolute path '/etc/passwd'"),
        ({**GOOD, "image": "C:\\x.png"}, "absolute path"),
        ({**GOOD, "image": "\\\\host\\x.png"}, "absolute path"),
        ({**GOOD, "image": "../x.png"}, "leaves the image folder"),
        ({**GOOD, "image": "a/../../x.png"}, "leaves the image folder"),
        ({**GOOD, "image": "a\\..\\..\\x.png"}, "leaves the image folder"),
        ({**GOOD, "image": "a\0.png"}, "leaves the image folder"),
    ],
)
def test_malformed_records(record: Any, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, [GOOD, record])
    with pytest.raises(UserError, match=rf"^{path}:record 1.*{message}"):
        load_records(path)


def test_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    path = write(tmp_path, [GOOD])
    copy = write(tmp_path, [GOOD], "other.json")
    assert fingerprint(path) == fingerprint(copy) == f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
    copy.write_text(copy.read_text() + " ")
    assert fingerprint(path) != fingerprint(copy)
