"""Images stay inside their root, whatever a data file or a link says; unless the user allows otherwise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llava_npu.data.images import load_image
from llava_npu.data.records import load_records
from llava_npu.data.tools.defects import RecordError
from llava_npu.errors import UserError


def write(folder: Path, image: str) -> Path:
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a"}]
    (folder / "images").mkdir(exist_ok=True)
    path = folder / "train.json"
    path.write_text(json.dumps([{"id": "x", "image": image, "conversations": turns}]))
    return path


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "outside" / "secret.png"
    path.parent.mkdir()
    path.write_bytes(b"secret")
    return path


@pytest.mark.parametrize("linked", ["file", "folder"])
def test_links_out_of_the_root(linked: str, secret: Path, tmp_path: Path) -> None:
    data = write(tmp_path, "link.png" if linked == "file" else "link/secret.png")
    if linked == "file":
        (tmp_path / "images/link.png").symlink_to(secret)
    else:
        (tmp_path / "images/link").symlink_to(secret.parent)
    (record,) = load_records(data, tmp_path / "images")
    with pytest.raises(
        RecordError, match=rf"train.json:record 0 \(id 'x'\).*a link leads out of .* to {secret}"
    ) as raised:
        record.image_paths  # noqa: B018
    assert raised.value.kind == "image path refused"
    (allowed,) = load_records(data, tmp_path / "images", allow_absolute_paths=True)
    assert allowed.image_paths[0].read_bytes() == b"secret"


def test_links_within_the_root_and_a_root_that_is_a_link(tmp_path: Path) -> None:
    data = write(tmp_path, "a/link.png")
    (tmp_path / "images/a").mkdir()
    (tmp_path / "images/b.png").write_bytes(b"image")
    (tmp_path / "images/a/link.png").symlink_to("../b.png")
    (tmp_path / "root").symlink_to("images")
    for root in ("images", "root"):
        (record,) = load_records(data, tmp_path / root)
        assert record.image_paths == (tmp_path / root / "a/link.png",)


def test_a_relative_root_after_a_change_of_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        (record,) = load_records(write(Path(), "a.png"), Path("images"))
        assert record.image_paths == (Path("images/a.png"),)


def test_a_sibling_whose_name_begins_like_the_root(tmp_path: Path) -> None:
    data = write(tmp_path, "link.png")
    (tmp_path / "images-private").mkdir()
    (tmp_path / "images/link.png").symlink_to(tmp_path / "images-private/x.png")
    with pytest.raises(RecordError, match="leads out of"):
        load_records(data, tmp_path / "images")[0].image_paths  # noqa: B018


def test_the_folder_itself_is_no_image(tmp_path: Path) -> None:
    (path,) = load_records(write(tmp_path, "."), tmp_path / "images")[0].image_paths
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        load_image(path)


def test_a_link_to_itself(tmp_path: Path) -> None:
    data = write(tmp_path, "loop.png")
    (tmp_path / "images/loop.png").symlink_to("loop.png")
    (path,) = load_records(data, tmp_path / "images")[0].image_paths
    with pytest.raises(UserError, match=r"loop.png: cannot be read"):
        load_image(path)


def test_absolute_paths(secret: Path, tmp_path: Path) -> None:
    data = write(tmp_path, str(secret))
    with pytest.raises(UserError, match=r"absolute path .*set data.allow_absolute_paths"):
        load_records(data)
    (record,) = load_records(data, allow_absolute_paths=True)
    assert record.image_paths == (secret,)


@pytest.mark.parametrize("name", ["../outside/secret.png", "a\0b"])
def test_what_is_never_allowed(name: str, secret: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="leaves the image folder"):
        load_records(write(tmp_path, name), tmp_path / "images", allow_absolute_paths=True)
