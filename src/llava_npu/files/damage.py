"""Telling what a file is that is not what its name says."""

from __future__ import annotations

from pathlib import Path

_LFS = b"version https://git-lfs.github.com/spec/"
_WEB_PAGES = (b"<!doctype html", b"<html")


def describe_damage(path: Path) -> str:
    """What a file's first bytes show it to be instead of its content; "" if nothing.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        return "is empty (0 bytes)"
    if head.startswith(_LFS):
        return "is a Git LFS pointer, not the file itself (`git lfs pull` in its folder fetches it)"
    if head.lstrip().lower().startswith(_WEB_PAGES):
        return "is a web page, not the file itself"
    return ""
