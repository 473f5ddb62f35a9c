"""JSON files that are damaged."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava_npu.errors import UserError
from llava_npu.files.json_objects import read_json, read_json_lines


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"[]", "should hold a JSON object, found list"), (b"", "is empty"), (b"\xff\x00", "is damaged")],
)
def test_what_is_not_one_object_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "file.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"file\.json {message}.*Fetch it again\."):
        read_json(tmp_path / "file.json", advice="Fetch it again")


def test_lines_without_the_one_that_was_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    assert read_json_lines(path, "Delete it") == []
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"st')
    assert read_json_lines(path, "Delete it") == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize("line", [b"garbage", b"\xff\xfe", b"[1]", b""])
def test_a_damaged_line_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"lines\.jsonl, line 2: .*Delete it\."):
        read_json_lines(path, "Delete it")
