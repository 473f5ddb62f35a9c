from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llava_npu.data.formats.parsing import Record
from llava_npu.data.records import load_records
from llava_npu.errors import UserError


def read(folder: Path, *entries: Any) -> list[Record]:
    path = folder / "train.json"
    path.write_text(json.dumps(entries))
    return load_records(path)


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


IMAGE = {"type": "image"}
WORDS = {"type": "text", "text": "What?"}


@pytest.mark.parametrize(
    ("entry", "texts", "images"),
    [
        ({"messages": [user("Hi"), assistant("Hello")]}, ["Hi", "Hello"], ()),
        ({"messages": [user("<image>What?"), assistant("a")], "images": ["1.jpg"]}, ["<image>What?", "a"], ("1.jpg",)),
        ({"conversations": [user("<image>"), assistant("a")], "image": "1.jpg"}, ["<image>", "a"], ("1.jpg",)),
        (
            {"messages": [{"from": "human", "value": "Hi"}, {"from": "chatgpt", "value": "Hello"}]},
            ["Hi", "Hello"],
            (),
        ),
        (
            {"messages": [user([IMAGE, WORDS]), assistant("a")], "images": ["1.jpg"]},
            ["<image>\nWhat?", "a"],
            ("1.jpg",),
        ),
        (
            {"messages": [user([{**IMAGE, "path": "1.jpg"}, WORDS]), assistant([{"type": "text", "text": "a"}])]},
            ["<image>\nWhat?", "a"],
            ("1.jpg",),
        ),
        (
            {"messages": [user([{"type": "image_url", "image_url": {"url": "1.jpg"}}]), assistant("a")]},
            ["<image>", "a"],
            ("1.jpg",),
        ),
        (
            {
                "messages": [user("<image>one"), assistant("a"), user([{**IMAGE, "image": "b.jpg"}]), assistant("b")],
                "images": ["a.jpg"],
            },
            ["<image>one", "a", "<image>", "b"],
            ("a.jpg", "b.jpg"),
        ),
        (
            {
                "messages": [user([{**IMAGE, "image": "b.jpg"}]), assistant("b"), user("<image>one"), assistant("a")],
                "images": ["a.jpg"],
            },
            ["<image>", "b", "<image>one", "a"],
            ("b.jpg", "a.jpg"),
        ),
        (
            {
                "texts": [{"user": "q", "assistant": "a"}, {"user": "r", "assistant": "b"}],
                "images": ["1.jpg", "2.jpg"],
            },
            ["<image>\n<image>\nq", "a", "r", "b"],
            ("1.jpg", "2.jpg"),
        ),
        ({"texts": [{"user": "<image>q", "assistant": "a"}], "images": "1.jpg"}, ["<image>q", "a"], ("1.jpg",)),
        ({"messages": [user("Hi"), assistant("Hello")], "image": None, "images": None, "id": None}, None, ()),
    ],
)
def test_forms(entry: Any, texts: list[str] | None, images: tuple[str, ...], tmp_path: Path) -> None:
    (record,) = read(tmp_path, entry)
    assert record.images == images
    if texts is not None:
        assert [turn.text for turn in record.conversations] == texts
    assert [turn.role for turn in record.conversations] == ["human", "gpt"] * (len(record.conversations) // 2)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"messages": [], "conversations": []}, "has both 'conversations' and 'messages'"),
        ({"messages": [{"role": "system", "content": "Be brief."}, user("q")]}, r"messages\[0\] is a system message"),
        ({"system": "Be brief.", "messages": [user("q"), assistant("a")]}, "'system' is 'Be brief.'"),
        ({"messages": [user("q"), {"role": "tool", "content": "a"}]}, "from is 'tool'; allowed are"),
        (
            {"messages": [user([IMAGE]), assistant("a")]},
            "part 0 is an image without a name",
        ),
        ({"messages": [user([{"type": "video"}]), assistant("a")]}, r"part 0 is \{'type': 'video'\}"),
        ({"messages": [user(["x"]), assistant("a")]}, "part 0 is 'x'"),
        ({"messages": [user([IMAGE]), assistant("a")], "images": ["1", "2"]}, "2 image.s. but 1 '<image>'"),
        ({"messages": [user([{**IMAGE, "path": "../1.jpg"}]), assistant("a")]}, "leaves the image folder"),
        ({"messages": [user(None), assistant("a")]}, "value is None; it must be text"),
        ({"messages": [{"role": "user"}, assistant("a")]}, "has no 'value'"),
        ({"texts": [{"user": "q"}]}, r"texts\[0\] is .*; a pair is"),
        ({"texts": []}, "is empty"),
        ({"messages": "hello"}, "is 'hello', not a list"),
    ],
)
def test_malformed(entry: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"train.json:record 0 .*{message}"):
        read(tmp_path, entry)
