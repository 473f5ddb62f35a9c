"""Checkpoint folders: whole or not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava_npu.training.checkpointing.checkpoints import (
    checkpoint_path,
    checkpoints,
    newest,
    prune,
    verify,
    write_folder,
)


def _write(folder: Path, step: int) -> Path:
    path = checkpoint_path(folder, step)
    write_folder(path, lambda target: (target / "weights").write_bytes(bytes(100)))
    return path


def test_a_failure_while_writing_leaves_nothing_with_the_final_name(tmp_path: Path) -> None:
    def fail(target: Path) -> None:
        (target / "half").write_text("half")
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        write_folder(checkpoint_path(tmp_path, 5), fail)
    assert checkpoints(tmp_path) == []
    prune(tmp_path, keep=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["shorter", "other bytes", "missing", "no manifest"])
def test_damage_is_found_and_the_checkpoint_before_is_used(tmp_path: Path, damage: str) -> None:
    _write(tmp_path, 5)
    path = _write(tmp_path, 10)
    weights = path / "weights"
    if damage == "shorter":
        weights.write_bytes(bytes(99))
    elif damage == "other bytes":
        weights.write_bytes(bytes(99) + b"x")
    elif damage == "missing":
        weights.unlink()
    else:
        (path / "manifest.json").unlink()
    assert verify(path) is not None
    reports: list[str] = []
    found = newest(checkpoints(tmp_path), reports.append)
    assert found is not None
    assert found.step == 5
    assert len(reports) == 1
    assert "checkpoint-000010" in reports[0]


def test_pruning_keeps_the_newest_by_number_not_by_name(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000, 5):
        _write(tmp_path, step)
    prune(tmp_path, keep=2)
    assert [each.step for each in checkpoints(tmp_path)] == [1_000_000, 999_999]


def test_a_file_in_the_place_of_a_folder_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / ".model.old.partial").write_text("x")
    prune(tmp_path, keep=1)
    assert not list(tmp_path.iterdir())


def test_writing_again_replaces(tmp_path: Path) -> None:
    _write(tmp_path, 5)
    write_folder(checkpoint_path(tmp_path, 5), lambda target: (target / "other").write_text("new"))
    assert sorted(path.name for path in checkpoint_path(tmp_path, 5).iterdir()) == ["manifest.json", "other"]
