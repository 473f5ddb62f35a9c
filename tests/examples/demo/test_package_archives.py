"""Packages are unpacked to what was asked for, and nowhere else."""

import io
import lzma
import tarfile
import zipfile
from pathlib import Path

import pytest

from demo.archives import unpack
from llava_npu.errors import UserError

FILES = {"package/a.txt": b"a", "package/deep/b.txt": b"b", "package/c.bin": b"c"}


def make_tar(
    path: Path, files: dict[str, bytes], extra: list[tarfile.TarInfo] | None = None, mode: str = "w:gz"
) -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        for member in extra or []:
            archive.addfile(member)
    return path


def make_wheel(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def make_deb(path: Path, files: dict[str, bytes], compress: str = "xz") -> Path:
    """As `man 5 deb` describes it: an ar archive of three members."""
    data = make_tar(path.with_suffix(".tar"), files, mode="w").read_bytes()
    packed = {"xz": lzma.compress, "": bytes}[compress](data)
    members = [
        ("debian-binary", b"2.0\n"),
        ("control.tar", b"odd"),
        (f"data.tar{'.' if compress else ''}{compress}", packed),
    ]
    with path.open("wb") as file:
        file.write(b"!<arch>\n")
        for name, content in members:
            file.write(f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode())
            file.write(content + b"\n" * (len(content) % 2))
    return path


MAKERS = {"x.whl": make_wheel, "x.tgz": make_tar, "x.deb": make_deb}


@pytest.mark.parametrize("name", MAKERS)
def test_only_matching_files_with_their_content(tmp_path, name):
    package = MAKERS[name](tmp_path / name, FILES)
    written = unpack(package, tmp_path / "out", ("*.txt",))
    assert {path.relative_to(tmp_path / "out").as_posix(): path.read_bytes() for path in written} == {
        "package/a.txt": b"a",
        "package/deep/b.txt": b"b",
    }
    assert not (tmp_path / "out/package/c.bin").exists()


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("member", ["../evil.txt", "/evil.txt", "package/../../evil.txt", "..\\evil.txt"])
def test_nothing_lands_outside(tmp_path, name, member):
    package = MAKERS[name](tmp_path / name, {member: b"evil"})
    with pytest.raises(UserError, match="outside"):
        unpack(package, tmp_path / "out", ("*",))
    assert not list(tmp_path.rglob("evil.txt"))


def test_links_are_left_out(tmp_path):
    link, hard = tarfile.TarInfo("package/link.txt"), tarfile.TarInfo("package/hard.txt")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    hard.type, hard.linkname = tarfile.LNKTYPE, "package/a.txt"
    package = make_tar(tmp_path / "x.tgz", FILES, [link, hard])
    assert sorted(path.name for path in unpack(package, tmp_path / "out", ("*.txt",))) == ["a.txt", "b.txt"]


def test_debian_package_without_compression(tmp_path):
    package = make_deb(tmp_path / "x.deb", {"./usr/share/a.txt": b"a"}, compress="")
    assert [path.read_bytes() for path in unpack(package, tmp_path / "out", ("*/share/*",))] == [b"a"]


@pytest.mark.parametrize("name", MAKERS)
def test_damaged_package_is_one_clear_error(tmp_path, name):
    package = MAKERS[name](tmp_path / name, {"a.txt": bytes(range(256)) * 400})
    whole = package.read_bytes()
    package.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"damaged|no data archive"):
        unpack(package, tmp_path / "out", ("*",))


def test_other_files_are_refused(tmp_path):
    (tmp_path / "x.rar").write_bytes(b"")
    with pytest.raises(UserError, match=r"not a \.whl, \.tgz or \.deb"):
        unpack(tmp_path / "x.rar", tmp_path / "out", ("*",))
    (tmp_path / "x.deb").write_bytes(b"<html>not found</html>")
    with pytest.raises(UserError, match="no Debian package"):
        unpack(tmp_path / "x.deb", tmp_path / "out", ("*",))
