"""The index of records that are not in memory: spans equal to what `json` finds, in windows of any size."""

from __future__ import annotations

import io
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_npu.data.formats import json_spans, record_files
from llava_npu.data.records import open_records
from llava_npu.data.tools.defects import RecordError
from llava_npu.errors import UserError

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def record(number: int, words: str = "q") -> dict[str, Any]:
    turns = [{"from": "human", "value": f"{words} {number}"}, {"from": "gpt", "value": "a\u2028 猫"}]
    return {"id": f"r{number}", "conversations": turns}


@pytest.mark.slow
@given(
    elements=st.lists(values, max_size=8),
    indent=st.sampled_from([None, 0, 3]),
    ascii_only=st.booleans(),
    window=st.integers(1, 64),
    mark=st.booleans(),
)
def test_list_spans(elements: list[Any], indent: int | None, ascii_only: bool, window: int, mark: bool) -> None:
    content = json.dumps(elements, indent=indent, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    content = b"\xef\xbb\xbf" * mark + content + b" \n"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_spans, "WINDOW_BYTES", window)
        spans = list(json_spans.list_spans(io.BytesIO(content), Path("x.json")))
    found = [json.loads(content[start : start + length]) for start, length, _ in spans]
    assert found == elements


@pytest.mark.parametrize("number", ["1.5", "1e5", "1E+5", "-1.25e-10", "12345"])
@pytest.mark.parametrize("window", range(1, 8))
def test_a_number_across_windows(number: str, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_spans, "WINDOW_BYTES", window)
    content = f"[{number}, {number}]".encode()
    spans = list(json_spans.list_spans(io.BytesIO(content), Path("x.json")))
    assert [content[start : start + length].decode() for start, length, _ in spans] == [number] * 2


@pytest.mark.slow
@given(st.text(alphabet='[]{},:"\\ 1e-ntu\n', max_size=30), st.integers(1, 16))
def test_what_is_no_json_list_is_refused(text: str, window: int) -> None:
    """Exactly what `json` refuses, or reads as something else than a list; never a bare exception."""
    try:
        expected = json.loads(text)
    except ValueError:
        expected = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_spans, "WINDOW_BYTES", window)
        if isinstance(expected, list):
            assert len(list(json_spans.list_spans(io.BytesIO(text.encode()), Path("x")))) == len(expected)
        else:
            with pytest.raises(UserError):
                list(json_spans.list_spans(io.BytesIO(text.encode()), Path("x")))


@pytest.mark.parametrize("window", [1, 7, 1 << 20])
@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('[{"a": 1},\n {"b": ]', "line 2, column 8"),
        ('[{"a": 1}\n {"b": 2}]', "line 2, column 2"),
        ('[{"a": 1},\n\n\n  {"b": "\t"}]', "line 4, column 10"),
        ("[1, 2]\n\n]", "line 3, column 1"),
        ('[{"a": "never ends', "line 1, column 8"),
        ("[1, 2", "line 1, column 6"),
    ],
)
def test_where_the_json_is_wrong(text: str, place: str, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_spans, "WINDOW_BYTES", window)
    with pytest.raises(UserError, match=f"not valid JSON at {place}:"):
        list(json_spans.list_spans(io.BytesIO(text.encode()), Path("x.json")))


def test_a_fault_in_a_large_file_is_found_without_reading_it_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_spans, "WINDOW_BYTES", 64)
    monkeypatch.setattr(json_spans, "MAX_RECORD_BYTES", 1024)
    file = io.BytesIO(b'[{"a": nope}, ' + b"1, " * 10_000 + b"1]")
    with pytest.raises(UserError, match="line 1, column 8"):
        list(json_spans.list_spans(file, Path("x.json")))
    assert file.tell() < 4096


def test_a_line_without_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_spans, "MAX_RECORD_BYTES", 100)
    path = tmp_path / "list.jsonl"
    path.write_text(json.dumps([record(number) for number in range(9)]))
    with pytest.raises(UserError, match=r"line 1 is longer than .* if this is a list, name it .json"):
        open_records(path)


@pytest.fixture(params=["train.json", "train.jsonl"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / request.param
    entries = [record(number) for number in range(20)]
    lines = "\n\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
    path.write_text(lines if path.suffix == ".jsonl" else json.dumps(entries, ensure_ascii=False, indent=1))
    return path


@pytest.fixture(params=["in memory", "in the cache"])
def kept(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("LLAVA_NPU_CACHE", str(tmp_path / "cache"))
    if request.param == "in the cache":
        monkeypatch.setattr(record_files, "CACHED_FROM_BYTES", 0)
    return request.param


def test_records_at_random(path: Path, kept: str) -> None:
    records = open_records(path)
    assert len(records) == 20
    assert [records[number].id for number in (7, 0, 19, 7)] == ["r7", "r0", "r19", "r7"]
    assert [each.id for each in records] == [f"r{number}" for number in range(20)]
    assert [each.id for each in records[3:9:2]] == ["r3", "r5", "r7"]
    assert records[7].conversations[1].text == "a\u2028 猫"
    assert records[7].origin == f"{path}:record 7" + (" (line 15)" if path.suffix == ".jsonl" else "")
    for outside in (20, -1):
        with pytest.raises(IndexError):
            records[outside]
    assert (path.parent / "cache").exists() == (kept == "in the cache")


def test_workers_share_the_index_instead_of_copying_it(path: Path, kept: str) -> None:
    records = open_records(path)
    size = len(pickle.dumps(records))
    copy = pickle.loads(pickle.dumps(records))  # noqa: S301
    assert copy[11].id == "r11"
    assert size < (1500 if kept == "in the cache" else 2000)


def test_the_index_is_made_once_and_again_after_a_change_or_damage(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAVA_NPU_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(record_files, "CACHED_FROM_BYTES", 0)
    length = len(open_records(path))
    with monkeypatch.context() as patch:
        patch.setattr(record_files, "list_spans", None)
        patch.setattr(record_files, "line_spans", None)
        assert open_records(path)[3].id == "r3"
    for index in (tmp_path / "cache/records").glob("*/[!.]*"):
        index.write_bytes(index.read_bytes()[:-24])
    assert len(open_records(path)) == length
    path.write_text(json.dumps(record(99)) if path.suffix == ".jsonl" else json.dumps([record(99)]))
    os.utime(path, ns=(1, 1))
    assert [each.id for each in open_records(path)] == ["r99"]


def test_a_file_changed_while_it_is_in_use(path: Path) -> None:
    records = open_records(path)
    path.write_text(path.read_text().replace("猫", "ca"))
    os.utime(path, ns=(1, 1))
    with pytest.raises(UserError, match="has changed since this run opened it"):
        records[2]


TWICE = b'{"image": "a.png", "image": "b.png", "conversations": []}'


def test_bad_records_stand_alone(tmp_path: Path) -> None:
    """One bad line is one bad record: the others are read."""
    path = tmp_path / "train.jsonl"
    good = json.dumps(record(0)).encode()
    path.write_bytes(b"\n".join([good, b'{"id": ', b'{"id": "caf\xe9"}', b"3", b"[" * 100_000, good, TWICE]))
    records = open_records(path)
    kinds = []
    for number in range(1, 5):
        with pytest.raises(RecordError) as raised:
            records[number]
        kinds.append(raised.value.kind)
        assert str(path) in str(raised.value)
        assert f"line {number + 1}" in str(raised.value)
    with pytest.raises(RecordError, match=r"line 7.*: the key 'image' is given twice; keep one"):
        records[6]
    assert kinds == ["unreadable record", "unreadable record", "malformed record", "unreadable record"]
    assert records[0].id == records[5].id == "r0"
