"""Parquet and Arrow tables as records. The folders are written as `datasets` writes them, without that package."""

from __future__ import annotations

import io
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava_npu.data.images import load_image
from llava_npu.data.records import fingerprint, open_records
from llava_npu.errors import UserError

pyarrow = pytest.importorskip("pyarrow", reason="needs the extra `data`")
from pyarrow import parquet  # noqa: E402

TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
HF_IMAGE = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVA_NPU_CACHE", str(tmp_path / "cache"))


def png(color: str) -> bytes:
    Image.new("RGB", (2, 2), color).save(stream := io.BytesIO(), "PNG")
    return stream.getvalue()


def table(**columns: Any) -> Any:
    return pyarrow.table(columns)


def with_images(values: list[Any], kind: Any, column: str = "image", turns: Any = None) -> Any:
    return table(
        id=[f"r{i}" for i in range(len(values))],
        conversations=[turns or TURNS] * len(values),
        **{column: pyarrow.array(values, kind)},
    )


def colors(records: Any) -> list[Any]:
    return [[load_image(path, "rec").getpixel((0, 0)) for path in record.image_paths] for record in records]


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([{"bytes": png("red"), "path": None}, {"bytes": png("lime"), "path": "lime.png"}], HF_IMAGE),
        ([png("red"), png("lime")], pyarrow.binary()),
        ([png("red"), png("lime")], pyarrow.large_binary()),
        (["red.png", "lime.png"], pyarrow.string()),
        ([{"bytes": None, "path": "red.png"}, {"bytes": png("lime"), "path": None}], HF_IMAGE),
        ([[png("red")], [png("lime")]], pyarrow.list_(pyarrow.binary())),
    ],
)
def test_ways_to_hold_an_image(values: list[Any], kind: Any, tmp_path: Path) -> None:
    for color in ("red", "lime"):
        (tmp_path / f"{color}.png").write_bytes(png(color))
    parquet.write_table(with_images(values, kind), tmp_path / "train.parquet")
    records = open_records(tmp_path / "train.parquet")
    assert [record.id for record in records] == ["r0", "r1"]
    assert colors(records) == [[(255, 0, 0)], [(0, 255, 0)]]
    assert records[1].origin == f"{tmp_path / 'train.parquet'}:row 1"


def test_several_images_and_none(tmp_path: Path) -> None:
    messages = [
        [{"role": "user", "content": "<image> or <image>?"}, {"role": "assistant", "content": "a"}],
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "b"}],
        [{"role": "user", "content": "Ho"}, {"role": "assistant", "content": "c"}],
    ]
    images = [[{"bytes": png("red"), "path": None}, {"bytes": png("blue"), "path": None}], [], None]
    parquet.write_table(
        table(messages=messages, images=pyarrow.array(images, pyarrow.list_(HF_IMAGE))), tmp_path / "t.parquet"
    )
    records = open_records(tmp_path / "t.parquet")
    assert colors(records) == [[(255, 0, 0), (0, 0, 255)], [], []]
    assert str(records[0].image_paths[1]) == f"{tmp_path / 't.parquet'}:row 0, images[1]"
    copied = pickle.loads(pickle.dumps(records))  # noqa: S301
    assert colors(copied) == colors(records)
    assert len(pickle.dumps(records)) < 2000
    assert dict.fromkeys(records[0].image_paths, 1) == dict.fromkeys(copied[0].image_paths, 1)


@pytest.mark.parametrize("where", [".", "data"])
def test_folder_of_parquet(where: str, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    (folder / where).mkdir(parents=True, exist_ok=True)
    for shard in range(3):
        rows = with_images([png("red")] * 2, pyarrow.binary())
        parquet.write_table(rows, folder / where / f"train-{shard:05d}-of-00003.parquet", row_group_size=1)
    records = open_records(folder)
    assert len(records) == 6
    assert "train-00002-of-00003.parquet:row 1" in records[5].origin
    before = fingerprint(folder)
    parquet.write_table(with_images([png("red")], pyarrow.binary()), folder / where / "test-00000-of-00001.parquet")
    with pytest.raises(UserError, match=r"holds the splits test, train; give the files of one, as in .*train-\*"):
        open_records(folder)
    assert fingerprint(folder / where / "train-*.parquet") == before
    assert len(open_records(folder / where / "train-*.parquet")) == 6


def test_saved_dataset(tmp_path: Path) -> None:
    """As `Dataset.save_to_disk` leaves it: Arrow streams named in state.json."""
    folder = tmp_path / "saved"
    folder.mkdir()
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    for name, color in zip(names, ("red", "blue"), strict=True):
        rows = with_images([{"bytes": png(color), "path": None}] * 3, HF_IMAGE)
        with pyarrow.OSFile(str(folder / name), "wb") as sink, pyarrow.ipc.new_stream(sink, rows.schema) as writer:
            writer.write_table(rows, max_chunksize=2)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    records = open_records(folder)
    assert colors(records) == [[(255, 0, 0)]] * 3 + [[(0, 0, 255)]] * 3
    assert not (tmp_path / "cache").exists()  # mapped where it lies
    for state in ("{}", '{"_data_files": [], "_indices_data_files": [{"filename": "i.arrow"}]}'):
        (folder / "state.json").write_text(state)
        with pytest.raises(UserError, match=r"state.json: not what Dataset.save_to_disk writes"):
            open_records(folder)


def test_a_training_and_a_test_file_in_a_folder(tmp_path: Path) -> None:
    for name in ("train", "test", "more"):
        parquet.write_table(with_images([png("red")], pyarrow.binary()), tmp_path / f"{name}.parquet")
    with pytest.raises(UserError, match=r"holds the splits test, train; give the files of one, as in .*train\.parquet"):
        open_records(tmp_path)
    (tmp_path / "test.parquet").unlink()
    assert len(open_records(tmp_path)) == 2


def test_saved_splits(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "state.json").write_text("{}")
    (tmp_path / "dataset_dict.json").write_text("{}")
    with pytest.raises(UserError, match="holds the splits test, train; give the folder of one"):
        open_records(tmp_path)


def test_an_image_that_is_no_picture_names_its_row(tmp_path: Path) -> None:
    parquet.write_table(with_images([b"junk"], pyarrow.binary()), tmp_path / "t.parquet")
    (record,) = open_records(tmp_path / "t.parquet")
    with pytest.raises(UserError, match=r"t.parquet:row 0, image: not an image"):
        load_image(record.image_paths[0], "rec")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"junk", "not a Parquet file, or a damaged one"),
        (b"", "not a Parquet file, or a damaged one"),
        (None, "cannot read the data file"),
        ("cut", "not a Parquet file, or a damaged one"),
        (table(question=["q"]), "its columns are question; one of them has to be conversations"),
        (with_images([], pyarrow.binary()), "no records in this table"),
    ],
)
def test_unusable_tables(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    if content == "cut":
        parquet.write_table(with_images([png("red")] * 50, pyarrow.binary()), path)
        path.write_bytes(path.read_bytes()[:-200])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        parquet.write_table(content, path)
    with pytest.raises(UserError, match=rf"^{path}: .*{message}"):
        open_records(path)


def test_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"needs pyarrow: pip install 'llava-npu\[data\]'"):
        open_records(tmp_path / "train.parquet")


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="it is a folder, and holds neither Parquet files nor a saved dataset"):
        open_records(tmp_path)


@pytest.mark.parametrize("column", ["rejected", "tools", "img"])
def test_columns_that_a_record_must_not_have_are_seen(column: str, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cat."}]
    parquet.write_table(table(conversations=[turns], **{column: ["No."]}), tmp_path / "t.parquet")
    with pytest.raises(UserError, match=rf"t\.parquet:row 0 .*'{column}' is 'No\.'"):
        open_records(tmp_path / "t.parquet")[0]
