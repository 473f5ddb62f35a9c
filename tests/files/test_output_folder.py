"""Folders that runs write to."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava_npu.errors import UserError
from llava_npu.files.output_folder import changes, claim_folder


def _claim(folder: Path) -> bool:
    return claim_folder(folder, "run.yaml", "output", "`llava-npu train`")


def test_new_and_empty_folders_are_taken_and_own_ones_are_recognised(tmp_path: Path) -> None:
    assert not _claim(tmp_path / "deep" / "new")
    assert not _claim(tmp_path / "deep" / "new")
    (tmp_path / "deep" / "new" / ".lock").touch()
    assert not _claim(tmp_path / "deep" / "new")
    (tmp_path / "deep" / "new" / "run.yaml").touch()
    assert _claim(tmp_path / "deep" / "new")


def test_somebody_elses_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(
        UserError, match=r"output: .* is not empty \(it holds thesis.tex\).*created by `llava-npu train`"
    ):
        _claim(tmp_path)
    with pytest.raises(UserError, match="is a file"):
        _claim(tmp_path / "thesis.tex")
    with pytest.raises(UserError, match=r"output: .* cannot be created or read"):
        _claim(tmp_path / "thesis.tex" / "below")


def test_changes_are_shown_key_by_key() -> None:
    before, now = {"a": 1, "b": 2, "gone": 3}, {"a": 1, "b": 4, "new": 5}
    assert changes(before, now) == ["  b: 2 → 4", "  gone: 3 → None", "  new: None → 5"]
    assert changes(before, now, matters=lambda key: key == "b") == ["  b: 2 → 4"]
