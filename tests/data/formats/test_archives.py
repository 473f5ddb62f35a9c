"""Images in tar and zip files are read as if they lay in a folder; damaged archives and members are one clear error."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from llava_npu.data.formats.archives import ImageArchive, open_archive
from llava_npu.data.images import load_image
from llava_npu.data.records import load_records, open_records
from llava_npu.errors import UserError

COLORS = {"a/red.png": (255, 0, 0), "blue.png": (0, 0, 255), "ä ö/lime.png": (0, 255, 0)}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVA_NPU_CACHE", str(tmp_path / "cache"))


def encoded(color: tuple[int, int, int]) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), color).save(stream, "PNG")
    return stream.getvalue()


def write_tar(path: Path, files: dict[str, bytes], prefix: str = "./") -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(prefix + name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_zip(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


FILES = {name: encoded(color) for name, color in COLORS.items()}
WRITERS: dict[str, Callable[[Path], Path]] = {
    "tar": lambda folder: write_tar(folder / "images.tar", FILES),
    "zip": lambda folder: write_zip(folder / "images.zip", FILES),
    "deflated": lambda folder: write_zip(folder / "deflated.zip", FILES, zipfile.ZIP_DEFLATED),
}


def test_tars_one_behind_the_other_in_a_file(tmp_path: Path) -> None:
    first, second = (write_tar(tmp_path / name, {name: FILES["blue.png"]}) for name in ("a", "b"))
    joined = tmp_path / "joined.tar"
    joined.write_bytes(first.read_bytes() + second.read_bytes() + b"no tar")
    archive = open_archive(joined)
    assert [archive.locate(name, "rec").read_bytes() for name in ("a", "b")] == [FILES["blue.png"]] * 2


@pytest.mark.parametrize("kind", WRITERS)
def test_members_are_read_at_random(kind: str, tmp_path: Path) -> None:
    archive = open_archive(WRITERS[kind](tmp_path))
    for name in [*COLORS, *reversed(COLORS)]:
        image = archive.locate(name, "rec")
        assert image.is_file()
        assert image.read_bytes() == FILES[name]
        assert load_image(image).getpixel((0, 0)) == COLORS[name]
    missing = archive.locate("a/gone.png", "rec")
    assert not missing.is_file()
    with pytest.raises(UserError, match=r"^rec: image .*:a/gone.png: .*no such file in the archive"):
        load_image(missing, "rec")


def test_records_with_an_archive(tmp_path: Path) -> None:
    WRITERS["tar"](tmp_path)
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a"}]
    (tmp_path / "train.json").write_text(json.dumps([{"image": "./a//red.png", "conversations": turns}]))
    (record,) = load_records(tmp_path / "train.json", tmp_path / "images.tar")
    assert record.image_paths[0].read_bytes() == FILES["a/red.png"]
    for name in ("/a/red.png", "../images.tar"):
        (tmp_path / "train.json").write_text(json.dumps([{"image": name, "conversations": turns}]))
        with pytest.raises(UserError, match=r"absolute path|leaves the image folder"):
            load_records(tmp_path / "train.json", tmp_path / "images.tar", allow_absolute_paths=True)


def test_shards(tmp_path: Path) -> None:
    names = list(FILES)
    write_tar(tmp_path / "images-0.tar", {names[0]: FILES[names[0]]})
    write_zip(tmp_path / "images-1.zip", {names[1]: FILES[names[1]]})
    write_tar(tmp_path / "images-2.tar", {names[2]: FILES[names[2]]}, prefix="")
    archive = open_archive(tmp_path / "images-*.tar")
    assert [archive.locate(name, "").is_file() for name in names] == [True, False, True]
    write_tar(tmp_path / "images-3.tar", {names[0]: b"another"})
    with pytest.raises(UserError, match=r"'a/red.png' is in both .*images-0.tar and .*images-3.tar"):
        open_archive(tmp_path / "images-*.tar")
    with pytest.raises(UserError, match="no file matches"):
        open_archive(tmp_path / "nothing-*.tar")


def test_what_tar_does_with_repeated_names_and_links(tmp_path: Path) -> None:
    path = tmp_path / "images.tar"
    with tarfile.open(path, "w") as archive:
        for name, content in (("a.png", b"old"), ("a.png", b"newer")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for name, kind in (("hard.png", tarfile.LNKTYPE), ("soft.png", tarfile.SYMTYPE), ("sub", tarfile.DIRTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "a.png"
            archive.addfile(member)
    opened = open_archive(path)
    assert opened.locate("a.png", "").read_bytes() == b"newer"
    assert opened.locate("hard.png", "").read_bytes() == b"newer"
    assert opened.locate("soft.png", "").read_bytes() == b"newer"
    assert not opened.locate("sub", "").is_file()


def test_the_list_of_members_is_made_once_and_again_after_a_change_or_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = WRITERS["tar"](tmp_path)
    first = open_archive(path)
    with monkeypatch.context() as patch:
        patch.setattr("llava_npu.data.formats.archives._tar_members", None)
        assert open_archive(path) == first
    first.index.write_bytes(b"")
    assert open_archive(path).locate(next(iter(FILES)), "").read_bytes() == next(iter(FILES.values()))
    write_tar(path, {"new.png": b"new"})
    os.utime(path, ns=(1, 1))
    assert open_archive(path).locate("new.png", "").read_bytes() == b"new"


def _read(archive: ImageArchive) -> list[bytes]:
    return [archive.locate(name, "").read_bytes() for name in COLORS]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers(method: str, tmp_path: Path) -> None:
    archive = open_archive(WRITERS["zip"](tmp_path))
    assert _read(archive) == list(FILES.values())  # opened here before there are workers
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.map(_read, [archive] * 4) == [list(FILES.values())] * 4


@pytest.mark.parametrize("name", ["images.tar.gz", "images.tgz", "images.tar.zst", "images.7z"])
def test_compressed_archives(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"x")
    (tmp_path / "train.json").write_text("[1]")
    with pytest.raises(UserError, match=r"unpack it, or repack it as .tar or .zip"):
        open_records(tmp_path / "train.json", tmp_path / name)


@pytest.mark.parametrize("kind", ["tar", "zip"])
@pytest.mark.parametrize("damage", ["junk", "empty", "missing", "cut", "cut between members", "overwritten"])
def test_damaged_archives(kind: str, damage: str, tmp_path: Path) -> None:
    path = WRITERS[kind](tmp_path)
    whole = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        contents = {
            "junk": b"junk" * 500,
            "empty": b"",
            "cut": whole[: len(whole) // 8],
            "cut between members": whole[:1024] if kind == "tar" else whole[:-30],
            "overwritten": whole[:1024] + b"x" * 512 + whole[1536:] if kind == "tar" else b"x" * len(whole),
        }
        path.write_bytes(contents[damage])
    with pytest.raises(UserError, match=rf"image_root {path}: (cannot be read|not a {kind} file, or a damaged one)"):
        open_archive(path)
    assert not list((tmp_path / "cache").glob("archives/[!.]*"))


def test_a_zip_of_a_version_that_nobody_knows(tmp_path: Path) -> None:
    path = WRITERS["zip"](tmp_path)
    whole = bytearray(path.read_bytes())
    whole[whole.index(b"PK\1\2") + 6] = 203
    path.write_bytes(whole)
    with pytest.raises(UserError, match=rf"image_root {path}: not a zip file, or a damaged one: zip file version 20.3"):
        open_archive(path)


def test_damaged_members(tmp_path: Path) -> None:
    for kind, position in (("zip", -1), ("deflated", 0)):
        path = WRITERS[kind](tmp_path)
        archive = open_archive(path)
        content = bytearray(path.read_bytes())
        with zipfile.ZipFile(path) as opened:
            member = opened.getinfo("blue.png")
        data = member.header_offset + 30 + len(member.filename)
        content[data + (member.compress_size - 1 if position else 0)] ^= 0xFF
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"blue.png: cannot be read: damaged in the archive"):
            load_image(archive.locate("blue.png", "rec"), "rec")
        assert archive.locate("a/red.png", "rec").read_bytes() == FILES["a/red.png"]


def test_a_zip_that_unpacks_to_more_than_it_says(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "bomb.zip", {"a.png": bytes(1 << 20)}, zipfile.ZIP_DEFLATED)
    content = path.read_bytes()
    path.write_bytes(content.replace((1 << 20).to_bytes(4, "little"), (1000).to_bytes(4, "little")))
    with pytest.raises(OSError, match="checksum is wrong"):
        open_archive(path).locate("a.png", "").read_bytes()


def test_unusual_compression(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "images.zip", FILES, zipfile.ZIP_LZMA)
    with pytest.raises(UserError, match="compressed by method 14; pack the images again"):
        open_archive(path)


def _linked(path: Path, links: dict[str, str]) -> Path:
    """An archive of a/red.png and symbolic links, which come before what they lead to."""
    if path.suffix == ".tar":
        with tarfile.open(path, "w") as archive:
            for name, target in links.items():
                member = tarfile.TarInfo(name)
                member.type, member.linkname = tarfile.SYMTYPE, target
                archive.addfile(member)
            member = tarfile.TarInfo("a/red.png")
            member.size = len(encoded((255, 0, 0)))
            archive.addfile(member, io.BytesIO(encoded((255, 0, 0))))
        return path
    with zipfile.ZipFile(path, "w") as archive:
        for name, target in links.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = 0o120777 << 16
            archive.writestr(info, target)
        archive.writestr("a/red.png", encoded((255, 0, 0)))
    return path


@pytest.mark.parametrize("suffix", [".tar", ".zip"])
def test_links_are_further_names_of_what_they_lead_to(tmp_path: Path, suffix: str) -> None:
    links = {
        "b/one.png": "../a/red.png",
        "two.png": "b/one.png",
        "c": "a",
        "d/e": "../a/",
        "out.png": "../../secret.png",
        "abs.png": "/etc/passwd",
    }
    archive = open_archive(_linked(tmp_path / f"images{suffix}", {**links, "round.png": "round.png"}))
    for name in ("b/one.png", "two.png", "c/red.png", "d/e/red.png"):
        assert load_image(archive.locate(name, "")).getpixel((0, 0)) == (255, 0, 0)
    for name in ("out.png", "abs.png", "round.png"):
        assert not archive.locate(name, "").is_file()
        with pytest.raises(UserError, match="a link to what is not in the archive"):
            load_image(archive.locate(name, ""))


@pytest.mark.parametrize("name", ["图片/红.png", "图.png"])  # the bytes of the second are valid UTF-8 as well
def test_a_tar_with_names_that_are_not_utf_8(tmp_path: Path, name: str) -> None:
    path = tmp_path / "images.tar"
    with tarfile.open(path, "w", encoding="gbk", format=tarfile.GNU_FORMAT) as archive:
        member = tarfile.TarInfo(name)
        member.size = len(encoded((255, 0, 0)))
        archive.addfile(member, io.BytesIO(encoded((255, 0, 0))))
    assert load_image(open_archive(path).locate(name, "")).getpixel((0, 0)) == (255, 0, 0)


def test_a_tar_with_a_hard_link_to_a_symbolic_one(tmp_path: Path) -> None:
    with tarfile.open(_linked(tmp_path / "images.tar", {"b/one.png": "../a/red.png"}), "a") as archive:
        member = tarfile.TarInfo("two.png")
        member.type, member.linkname = tarfile.LNKTYPE, "b/one.png"
        archive.addfile(member)
    found = open_archive(tmp_path / "images.tar").locate("two.png", "")
    assert load_image(found).getpixel((0, 0)) == (255, 0, 0)


def test_a_zip_of_a_program_for_windows(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("a\\red.png", encoded((255, 0, 0)))
    found = open_archive(tmp_path / "images.zip").locate("a/red.png", "")
    assert load_image(found).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("encoding", ["gbk", "utf-8", "cp437"])
def test_a_zip_whose_names_are_in_its_systems_encoding(tmp_path: Path, encoding: str) -> None:
    name = "é.png" if encoding == "cp437" else "图片.png"
    raw = name.encode(encoding)
    stand_in = "x" * (len(raw) - 4) + ".png"
    with zipfile.ZipFile(tmp_path / "written.zip", "w") as archive:
        archive.writestr(stand_in, encoded((255, 0, 0)))
    path = tmp_path / "images.zip"
    path.write_bytes((tmp_path / "written.zip").read_bytes().replace(stand_in.encode(), raw))
    assert load_image(open_archive(path).locate(name, "")).getpixel((0, 0)) == (255, 0, 0)
