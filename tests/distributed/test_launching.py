"""Processes that end with the one that started them, however that ends."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from llava_npu.distributed import launched
from llava_npu.errors import UserError

WHOLE = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
_NUMBER = "\nPath(sys.argv[1], str(os.getpid())).touch()\ntime.sleep(600)\n"
_LAUNCHED = "import os, sys, time\nfrom pathlib import Path" + _NUMBER
_POOL = """
import multiprocessing, os, sys, time
from pathlib import Path
from llava_npu.distributed.launched import worker_dies_with_parent

def work(folder):
    Path(folder, f"{os.getpid()}-started").touch()
    while not Path(folder, "go").is_file():
        time.sleep(0.01)
    worker_dies_with_parent()
    Path(folder, "survived" if len(sys.argv) > 2 else str(os.getpid())).touch()
    time.sleep(600)

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    for _ in range(2):
        context.Process(target=work, args=(sys.argv[1],)).start()
    time.sleep(600)
"""


def _wait_until(condition, seconds: float = 300) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _lives(number: str) -> bool:
    try:
        return psutil.Process(int(number)).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent is gone")
@pytest.mark.parametrize("kind", ["launched", "workers"])
def test_children_end_with_a_killed_parent(tmp_path: Path, kind: str) -> None:
    script, found = tmp_path / "script.py", tmp_path / "found"
    script.write_text(_LAUNCHED if kind == "launched" else _POOL)
    found.mkdir()
    launcher = ["-m", "llava_npu.distributed.launching", "2"] if kind == "launched" else []
    (found / "go").touch()
    parent = subprocess.Popen([sys.executable, *launcher, str(script), str(found)])
    _wait_until(lambda: len([path for path in found.iterdir() if path.name.isdigit()]) == 2)
    parent.kill()
    parent.wait()
    _wait_until(lambda: not any(_lives(path.name) for path in found.iterdir() if path.name.isdigit()))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent is gone")
def test_a_worker_whose_parent_is_gone_already_ends(tmp_path: Path) -> None:
    script, found = tmp_path / "script.py", tmp_path / "found"
    script.write_text(_POOL)
    found.mkdir()
    parent = subprocess.Popen([sys.executable, str(script), str(found), "then"])
    _wait_until(lambda: len(list(found.glob("*-started"))) == 2)
    parent.kill()
    parent.wait()
    workers = [path.name.removesuffix("-started") for path in found.glob("*-started")]
    (found / "go").touch()
    _wait_until(lambda: not any(map(_lives, workers)))
    assert not (found / "survived").exists()


def test_what_a_program_gets_and_how_its_failure_is_told(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\nprint(os.environ['RANK'], sys.argv[1])\nsys.exit(3 * (os.environ['RANK'] == '1'))\n"
    )
    ended = subprocess.run(
        [sys.executable, "-m", "llava_npu.distributed.launching", "2", str(script), "word"],
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 3
    assert ended.stdout == "0 word\n"
    assert ended.stderr == "process 1 left with status 3; its last output:\n1 word\n"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "1"}, "RANK=1 is set, as by a launcher, but not WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "2"}, "but not RANK, LOCAL_RANK"),
        ({"LOCAL_RANK": "0"}, "but not RANK, WORLD_SIZE, MASTER_ADDR"),
        ({**WHOLE, "RANK": "two"}, "RANK='two' is not a whole number"),
        ({**WHOLE, "RANK": "2"}, "RANK=2 is not one of WORLD_SIZE=2 processes"),
        (WHOLE, ""),
        ({"RANK": "0", "WORLD_SIZE": "1"}, ""),
        ({}, ""),
    ],
)
def test_half_of_a_launchers_variables(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    for name in WHOLE:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if message:
        with pytest.raises(UserError, match=message):
            launched.world_size()
    else:
        assert launched.world_size() == int(variables.get("WORLD_SIZE", 1))
