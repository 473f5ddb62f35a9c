"""Images in tar or zip files: one file, or many shards, where millions of small files would choke a file system.

    image_root: images.tar          image_root: images.zip          image_root: shards/images-*.tar

An archive's members are listed once into a small database in the user's cache; an image is then one look-up and one
read at its place, from any number of processes. Compressed tar files have no places to read at and are refused; a zip
file may compress its members or not.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import posixpath
import sqlite3
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote

from llava_npu.errors import UserError
from llava_npu.files.cache import build_once, cache_root

ARCHIVE_SUFFIXES = (".tar", ".zip")
MAX_IMAGE_BYTES = 1 << 30
_COMPRESSED_SUFFIXES = (".tgz", ".tbz2", ".txz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar")
_INDEX = "members.sqlite"
_INDEX_FORMAT = 3
_ZIP_HEADER = struct.Struct("<4s5H3I2H")  # the local file header before each member
_RAW, _DEFLATED, _DEAD_LINK = 0, 8, -1
_UTF8_NAME = 0x800  # the flag of a zip member
_LONGEST_LINK = 4096
_ZEROS_AT_ONCE = 1 << 20  # bytes


@dataclass(frozen=True, slots=True)
class ImageArchive:
    """One archive, or several that share out the images; an image root."""

    name: str
    files: tuple[Path, ...] = field(compare=False)
    index: Path  # its name stands for the files' identity
    allow_absolute_paths: bool = False

    def __str__(self) -> str:
        return self.name

    def locate(self, image: str, where: str) -> ArchivedImage:
        return ArchivedImage(self, _normal(image))


@dataclass(frozen=True, slots=True)
class ArchivedImage:
    """A member of an archive; reads like a path."""

    archive: ImageArchive
    member: str

    def __str__(self) -> str:
        return f"{self.archive}:{self.member}"

    def is_file(self) -> bool:
        place = self._place()
        return place is not None and place[4] != _DEAD_LINK

    def read_bytes(self) -> bytes:
        place = self._place()
        if place is None:
            raise FileNotFoundError(errno.ENOENT, "no such file in the archive", str(self))
        shard, offset, packed_size, size, method, checksum = place
        if method == _DEAD_LINK:
            raise FileNotFoundError(errno.ENOENT, "it is a link to what is not in the archive", str(self))
        if max(size, packed_size) > MAX_IMAGE_BYTES:
            raise OSError(errno.EFBIG, f"{size:,} bytes are too many for an image", str(self))
        file = _open(self.archive.files[shard], os.getpid())
        if self.archive.files[shard].suffix.lower() == ".tar":
            return _read(file, size, offset, self)
        header = _ZIP_HEADER.unpack(_read(file, _ZIP_HEADER.size, offset, self))
        if header[0] != b"PK\3\4":
            raise _damaged(self, "its header is not where the archive's list says")
        # The name and extra fields here may differ in length from those in the archive's list.
        packed = _read(file, packed_size, offset + _ZIP_HEADER.size + header[-2] + header[-1], self)
        data = _inflate(packed, size, self) if method == _DEFLATED else packed
        if len(data) != size or zlib.crc32(data) != checksum:
            raise _damaged(self, "its checksum is wrong")
        return data

    def _place(self) -> tuple[int, int, int, int, int, int] | None:
        try:
            found = _connect(self.archive.index, os.getpid()).execute(
                "SELECT shard, offset, packed_size, size, method, checksum FROM members WHERE name = ?", (self.member,)
            )
            return found.fetchone()
        except sqlite3.Error as error:
            raise OSError(errno.EIO, f"the list of members {self.archive.index} is unusable: {error}") from error


def is_archive(path: str | Path) -> bool:
    """Whether an image root is an archive (or a compressed one, which `open_archive` refuses)."""
    return Path(path).suffix.lower() in (*ARCHIVE_SUFFIXES, *_COMPRESSED_SUFFIXES) and not Path(path).is_dir()


def open_archive(path: str | Path) -> ImageArchive:
    """Opens an archive, or all that match a `*` in the last part of the path; lists their members first if need be.

    Raises:
        UserError: there is none, it is compressed as a whole or damaged, or two of them hold the same name.
    """
    path = Path(path)
    if path.suffix.lower() in _COMPRESSED_SUFFIXES:
        raise UserError(
            f"image_root {path}: images cannot be read at random from a compressed archive; unpack it, or repack it as "
            ".tar or .zip"
        )
    files = tuple(sorted(path.parent.glob(path.name))) if "*" in path.name else (path,)
    if not files:
        raise UserError(f"image_root {path}: no file matches")
    try:
        identity = [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    except OSError as error:
        raise UserError(f"image_root {path}: cannot be read: {error.strerror or error}") from error
    key = hashlib.sha256(json.dumps([_INDEX_FORMAT, identity]).encode()).hexdigest()[:32]
    folder = build_once(cache_root() / "archives" / key, lambda partial: _write_index(partial / _INDEX, files))
    return ImageArchive(str(path), files, folder / _INDEX)


def _write_index(index: Path, files: tuple[Path, ...]) -> None:
    database = sqlite3.connect(index, isolation_level=None)
    try:
        database.execute("PRAGMA journal_mode = OFF")
        database.execute("PRAGMA synchronous = OFF")  # an unfinished index is thrown away
        database.execute("BEGIN")
        database.execute(
            "CREATE TABLE members (name TEXT PRIMARY KEY, shard INTEGER, offset INTEGER, packed_size INTEGER, "
            "size INTEGER, method INTEGER, checksum INTEGER) WITHOUT ROWID"
        )
        for shard, file in enumerate(files):
            members = _tar_members(file) if file.suffix.lower() == ".tar" else _zip_members(file)
            for name, *place in members:
                # Within one archive the later member replaces the earlier, as when unpacking.
                cursor = database.execute(
                    "INSERT INTO members VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7) ON CONFLICT (name) DO UPDATE SET "
                    "offset = ?3, packed_size = ?4, size = ?5, method = ?6, checksum = ?7 WHERE shard = ?2",
                    (name, shard, *place),
                )
                if not cursor.rowcount:
                    other = database.execute("SELECT shard FROM members WHERE name = ?", (name,)).fetchone()[0]
                    raise UserError(
                        f"image_root: {name!r} is in both {files[other]} and {file}, so it is unclear which one a "
                        "record means; remove one, or rename it"
                    )
        database.execute("COMMIT")
    finally:
        database.close()


Place = tuple[int, int, int, int, int]  # offset, packed size, size, method, checksum
Member = tuple[str, int, int, int, int, int]  # name, and its place


def _resolve(links: dict[str, str], places: dict[str, Place]) -> Iterator[Member]:
    """Symbolic links as further names of what they lead to, a file or all of a folder; one that leads nowhere is kept,
    to be named when asked.
    """
    for name, target in links.items():
        seen = {name}
        while target in links and target not in seen:
            seen.add(target)
            target = links[target]
        inside = () if target in places else [member for member in places if member.startswith(f"{target}/")]
        if not inside:
            yield name, *places.get(target, (0, 0, 0, _DEAD_LINK, 0))
        for member in inside:
            yield name + member.removeprefix(target), *places[member]


def _link_target(name: str, target: str) -> str:
    """The member that a link leads to; "" if it leads out of the archive."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(name), target))
    return "" if path.startswith(("/", "../")) else path


def _readings(name: str) -> list[str]:
    """What a tar's name, which is bytes, may be: those of old Chinese systems are GBK, and some of these are also valid
    UTF-8. What is neither is spelled out.
    """
    raw = name.encode("utf-8", "surrogateescape")
    found = []
    for encoding in ("ascii",) if raw.isascii() else ("utf-8", "gb18030"):
        with suppress(UnicodeDecodeError):
            found.append(raw.decode(encoding))
    return found or [raw.decode("utf-8", "backslashreplace")]


def _zip_names(member: zipfile.ZipInfo) -> Iterator[str]:
    """A zip without the flag for UTF-8 holds names in whatever its system had; Python takes them for code page 437."""
    yield member.filename
    if "\\" in member.filename:
        yield member.filename.replace("\\", "/")  # as some programs for Windows write it
    if not member.flag_bits & _UTF8_NAME and not member.filename.isascii():
        raw = member.filename.encode("cp437")
        for encoding in ("utf-8", "gb18030"):  # a name may be valid in both, and a record use either
            with suppress(UnicodeDecodeError):
                yield raw.decode(encoding)


def _tar_members(path: Path) -> Iterator[Member]:
    places: dict[str, Place] = {}  # for links; a hard link is how tar stores a second copy
    links: dict[str, str] = {}
    try:
        with path.open("rb") as file:
            for member in _headers(file):
                target = _normal(_readings(member.linkname)[0])
                for name in map(_normal, _readings(member.name)):
                    if member.isreg() and not member.issparse():
                        places[name] = (member.offset_data, member.size, member.size, _RAW, 0)
                    elif member.islnk() and target in places:
                        places[name] = places[target]
                    elif member.islnk() and target in links:
                        links[name] = links[target]
                        continue
                    elif member.issym():
                        links[name] = _link_target(name, _readings(member.linkname)[0])
                        continue
                    else:
                        continue
                    links.pop(name, None)
                    yield name, *places[name]
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"image_root {path}: not a tar file, or a damaged one: {error}") from error
    yield from _resolve(links, places)


def _headers(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The members of a tar, and of those that stand behind it in the file: `cat a.tar b.tar` makes such."""
    start: int | None = 0
    while start is not None:
        file.seek(start)
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # it would keep a large object per member
                yield member
            # tarfile takes a damaged header for the end of the archive, which is a block of zeros.
            end = os.pread(file.fileno(), tarfile.BLOCKSIZE, archive.offset)
            if end != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"no member and no end at byte {archive.offset:,}")
            start = _next_archive(file, archive.offset)


def _next_archive(file: BinaryIO, end: int) -> int | None:
    """Where another tar begins after the zeros at `end`, if one does; anything but a header ends the archive."""
    while chunk := os.pread(file.fileno(), _ZEROS_AT_ONCE, end):
        filled = chunk.lstrip(b"\0")
        end += len(chunk) - len(filled)
        if filled:
            start = end - end % tarfile.BLOCKSIZE
            with suppress(tarfile.HeaderError):
                tarfile.TarInfo.frombuf(os.pread(file.fileno(), tarfile.BLOCKSIZE, start), "utf-8", "surrogateescape")
                return start
            return None
    return None


def _zip_members(path: Path) -> Iterator[Member]:
    places: dict[str, Place] = {}
    links: dict[str, str] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if member.is_dir():
                    continue
                if member.flag_bits & 1 or member.compress_type not in (_RAW, _DEFLATED):
                    kind = "encrypted" if member.flag_bits & 1 else f"compressed by method {member.compress_type}"
                    raise UserError(
                        f"image_root {path}: {member.filename!r} is {kind}; pack the images again, stored or deflated "
                        "(`zip -0 -r images.zip images`)"
                    )
                place = (
                    member.header_offset,
                    member.compress_size,
                    member.file_size,
                    member.compress_type,
                    member.CRC,
                )
                for name in dict.fromkeys(map(_normal, _zip_names(member))):
                    if stat.S_ISLNK(member.external_attr >> 16) and member.file_size < _LONGEST_LINK:
                        links[name] = _link_target(name, archive.read(member).decode("utf-8", "replace"))
                    else:
                        places[name] = place
                        yield name, *place
    except UserError:
        raise
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, ValueError, zlib.error) as error:
        raise UserError(f"image_root {path}: not a zip file, or a damaged one: {error}") from error
    yield from _resolve(links, places)


def _normal(name: str) -> str:
    """ "./a//b.jpg" and "a/b.jpg" are the same file; `tar -c .` writes the former."""
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def _read(file: BinaryIO, size: int, offset: int, image: ArchivedImage) -> bytes:
    data = os.pread(file.fileno(), size, offset)
    if len(data) != size:
        raise _damaged(image, "the archive ends before it does")
    return data


def _inflate(packed: bytes, size: int, image: ArchivedImage) -> bytes:
    try:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, size + 1)  # never more than it says it is
    except zlib.error as error:
        raise _damaged(image, str(error)) from error


def _damaged(image: ArchivedImage, reason: str) -> OSError:
    return OSError(errno.EIO, f"damaged in the archive: {reason}", str(image))


# Per process: neither a database connection nor its file may be shared across a fork.
@lru_cache(maxsize=16)
def _connect(index: Path, process: int) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{quote(str(index))}?mode=ro&immutable=1", uri=True, check_same_thread=False)


@lru_cache(maxsize=1024)
def _open(path: Path, process: int) -> BinaryIO:
    return path.open("rb", buffering=0)
