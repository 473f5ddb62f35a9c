"""Folders of the cache are built once, and again when they are damaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from llava_npu.errors import UserError
from llava_npu.files.cache import build_once, locked_in_cache


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "deep/index").unlink(),
        lambda folder: (folder / "deep/index").write_bytes(b""),
        lambda folder: (folder / "deep/index").write_bytes(b"inde"),
        lambda folder: next(folder.glob(".*")).write_text("[1"),
        lambda folder: next(folder.glob(".*")).unlink(),
    ],
    ids=["a file missing", "empty", "cut short", "no sizes", "none at all"],
)
def test_a_damaged_folder_is_built_again(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    built = []

    def build(folder: Path) -> None:
        built.append(folder)
        (folder / "deep").mkdir()
        (folder / "deep/index").write_bytes(b"index")

    folder = build_once(tmp_path / "cache/a", build)
    (folder / "more").touch()  # of whoever uses it
    assert build_once(folder, build) == folder
    assert len(built) == 1
    damage(folder)
    build_once(folder, build)
    assert len(built) == 2
    assert (folder / "deep/index").read_bytes() == b"index"


def test_a_file_in_place_of_the_cache_is_named(tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    with pytest.raises(UserError, match=r"cannot write the cache folder .*cache/a: Not a directory.*LLAVA_NPU_CACHE"):
        locked_in_cache(tmp_path / "cache/a/.lock").__enter__()
