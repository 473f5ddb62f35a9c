"""Unpacking wheels, npm tarballs and Debian packages: regular files only, never outside the target."""

from __future__ import annotations

import fnmatch
import io
import lzma
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO

from llava_npu.errors import UserError


def unpack(package: Path, target: Path, patterns: Sequence[str]) -> list[Path]:
    """Writes the members of `package` that match one of the patterns under `target`, links and devices left out.

    Args:
        package: a .whl, .tgz or .deb file.
        target: folder; members keep their path in it.
        patterns: as in fnmatch, on the whole path inside the package ("*" matches "/" too).

    Raises:
        UserError: the file is no such package, is damaged, or a member would land outside the target.
    """
    written = []
    try:
        for name, source in _members(package, patterns):
            path = _inside(target, name, package)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                shutil.copyfileobj(source, file)
            written.append(path)
    except (zipfile.BadZipFile, tarfile.TarError, lzma.LZMAError, EOFError) as error:
        raise UserError(f"{package.name} is damaged: {error}. Fetch it again.") from error
    return written


def _members(package: Path, patterns: Sequence[str]) -> Iterator[tuple[str, IO[bytes]]]:
    if package.suffix == ".whl":
        return _zip_members(package, patterns)
    if package.suffix == ".tgz":
        return _tar_members(package, package.open("rb"), patterns)
    if package.suffix == ".deb":
        return _tar_members(package, _debian_data(package), patterns)
    raise UserError(f"{package.name}: not a .whl, .tgz or .deb file.")


def _zip_members(package: Path, patterns: Sequence[str]) -> Iterator[tuple[str, IO[bytes]]]:
    with zipfile.ZipFile(package) as archive:
        for member in archive.infolist():
            if not member.is_dir() and _matches(member.filename, patterns):
                with archive.open(member) as source:
                    yield member.filename, source


def _tar_members(package: Path, data: IO[bytes], patterns: Sequence[str]) -> Iterator[tuple[str, IO[bytes]]]:
    with data, tarfile.open(fileobj=data, mode="r|*") as archive:  # a stream: nothing is held in memory
        for member in archive:
            if member.isreg() and _matches(member.name, patterns):
                source = archive.extractfile(member)
                if source is None:
                    raise UserError(f"{package.name}: {member.name} cannot be read.")
                yield member.name, source


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _inside(target: Path, name: str, package: Path) -> Path:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name:
        raise UserError(f"{package.name}: member {name!r} would land outside the folder. The package is not trusted.")
    return target / path


def _debian_data(package: Path) -> IO[bytes]:
    """The data archive inside a .deb: an `ar` file of debian-binary, control.tar.*, data.tar.* (man 5 deb)."""
    with package.open("rb") as file:
        if file.read(8) != b"!<arch>\n":
            raise UserError(f"{package.name} is no Debian package (or is damaged). Fetch it again.")
        while header := file.read(60):
            if len(header) < 60 or header[58:] != b"`\n" or not header[48:58].strip().isdigit():
                raise UserError(f"{package.name} is damaged. Fetch it again.")
            name, size = header[:16].decode("ascii", "replace").strip().rstrip("/"), int(header[48:58])
            if name.startswith("data.tar"):
                if name.endswith(".zst"):  # not in Python's library
                    return _with_dpkg(package)
                return io.BytesIO(file.read(size))
            file.seek(size + size % 2, io.SEEK_CUR)
    raise UserError(f"{package.name} holds no data archive. Fetch it again.")


def _with_dpkg(package: Path) -> IO[bytes]:
    try:
        result = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(package)], capture_output=True, check=True)
    except FileNotFoundError as error:
        raise UserError(f"{package.name} is compressed with zstd: dpkg-deb is needed to unpack it.") from error
    except subprocess.CalledProcessError as error:
        raise UserError(f"{package.name}: dpkg-deb failed: {error.stderr.decode(errors='replace').strip()}") from error
    return io.BytesIO(result.stdout)
