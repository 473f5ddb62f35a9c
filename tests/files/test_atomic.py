"""Files and folders that are whole or not there."""

from __future__ import annotations

import os
import resource
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llava_npu.errors import UserError
from llava_npu.files.atomic import replacing, write_folder, write_text


@pytest.fixture(params=[0o022, 0o027, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    for text in ("one", "two"):
        write_text(tmp_path / "new" / "file.txt", text)
        assert (tmp_path / "new" / "file.txt").read_text() == text
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file.txt"]


def test_a_failure_keeps_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "old")
    with pytest.raises(TypeError), replacing(tmp_path / "file") as temporary:
        temporary.write_text(1)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`run.yaml`, manifests and reports are written so: a power cut leaves the old one or the new one."""
    synced = []

    def fsync(descriptor: int) -> None:
        synced.append((os.path.realpath(f"/proc/self/fd/{descriptor}"), (tmp_path / "run.yaml").exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    write_text(tmp_path / "run.yaml", "config: {}")
    ((file, has_its_name),) = synced
    assert Path(file).parent == tmp_path
    assert not has_its_name


def test_files_have_the_permissions_of_the_umask(tmp_path: Path, umask: int) -> None:
    write_text(tmp_path / "text", "text")
    with replacing(tmp_path / "weights.safetensors") as temporary:
        save_file({"weight": torch.zeros(3)}, temporary)
    for name in ("text", "weights.safetensors"):
        assert _mode(tmp_path / name) == 0o666 & ~umask


def test_all_of_a_folder_has_the_permissions_of_the_umask(tmp_path: Path, umask: int) -> None:
    def fill(folder: Path) -> None:
        (folder / "deep").mkdir()
        save_file({"weight": torch.zeros(3)}, folder / "deep" / "weights.safetensors")
        (folder / "private").touch(mode=0o600)

    write_folder(tmp_path / "folder", fill)
    assert _mode(tmp_path / "folder") == 0o777 & ~umask
    for name in ("deep/weights.safetensors", "private"):
        assert _mode(tmp_path / "folder" / name) == 0o666 & ~umask


@pytest.mark.parametrize("resume", [False, True])
def test_an_interrupted_folder_is_not_there(tmp_path: Path, resume: bool) -> None:
    def interrupted(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise KeyboardInterrupt

    write_folder(tmp_path / "folder", lambda folder: (folder / "old").touch())
    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "folder", interrupted, resume=resume)
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["old"]
    found: list[str] = []
    write_folder(tmp_path / "folder", lambda folder: found.extend(p.name for p in folder.iterdir()), resume=resume)
    assert found == (["half"] if resume else [])
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("by", ["python", "safetensors"])
def test_a_full_disk_is_one_clear_error(tmp_path: Path, by: str) -> None:
    def fill(folder: Path) -> None:
        if by == "python":
            (folder / "large").write_bytes(bytes(100_000))
        else:
            save_file({"weight": torch.zeros(100_000)}, folder / "large.safetensors")

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(UserError, match=r"no space left on the disk.*Delete the moon\."):
            write_folder(tmp_path / "folder", fill, advice="Delete the moon")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/inside: cannot be written"):
        write_text(tmp_path / "file" / "inside", "text")
    with pytest.raises(UserError, match="file/inside: cannot be written"):
        write_folder(tmp_path / "file" / "inside", lambda folder: None)


def test_what_cannot_be_read_while_writing_is_not_blamed_on_the_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        write_folder(tmp_path / "folder", lambda folder: (tmp_path / "absent").read_bytes())
