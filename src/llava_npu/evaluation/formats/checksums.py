"""Is this the published file? Known MD5 sums, compared."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

_CHUNK = 2**20  # bytes


def md5_of(path: Path) -> str:
    """A file's MD5: what publishers of benchmarks give. (It tells files apart; it proves nothing about an attacker.)"""
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def checksum_note(path: Path, md5: str, known: Mapping[str, str]) -> str:
    """Which published file it is, if any.

    Args:
        path: the file.
        md5: its MD5.
        known: published file → MD5.
    """
    same = [name for name, published in known.items() if published == md5]
    if same:
        return f"Data: the published {same[0]} (MD5 {md5})."
    if path.name in known:
        return (
            f"Data: {path.name} has the MD5 {md5}, not {known[path.name]} as published. It was changed, or is another "
            "release: scores may not be comparable."
        )
    return f"Data: MD5 {md5}, which is none of the published files ({', '.join(known)})."
