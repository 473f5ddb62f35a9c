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
_TRIALS = """
import sys
from pathlib import Path
from types import SimpleNamespace
from llava_npu.comparison import scheduler

scheduler.WORKER = (sys.argv[2],)
trials = [SimpleNamespace(folder=Path(sys.argv[1], name), encoder=name) for name in ("alone", "launched")]
for trial in trials:
    trial.folder.mkdir()
scheduler.run_trials(trials, [scheduler.Slot("cpu"), scheduler.Slot("cpu", 2)], print)
"""
_TRIAL = """
import os, sys, time
from pathlib import Path
Path(sys.argv[1]).with_name(str(os.getpid())).touch()
time.sleep(600)
"""
_LOADER = """
import time
from torch.utils.data import DataLoader
from llava_npu.training.batches import _start_worker

class Slow:
    def __len__(self):
        return 4

    def __getitem__(self, index):
        time.sleep(600)

if __name__ == "__main__":
    iter(DataLoader(Slow(), num_workers=2, multiprocessing_context="spawn", worker_init_fn=_start_worker))
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
@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("launched", 2),
        ("workers", 2),
        pytest.param("trials", 3, marks=pytest.mark.slow),
    ],
)
def test_children_end_with_a_killed_parent(tmp_path: Path, kind: str, count: int) -> None:
    """Processes of `--devices` (of `train` and `eval`), of data commands, and of a comparison's trials."""
    script, worker, found = tmp_path / "script.py", tmp_path / "worker.py", tmp_path / "found"
    script.write_text({"launched": _LAUNCHED, "workers": _POOL, "trials": _TRIALS}[kind])
    worker.write_text(_TRIAL)
    found.mkdir()
    launcher = ["-m", "llava_npu.distributed.launching", "2"] if kind == "launched" else []
    (found / "go").touch()
    arguments = [str(script), str(found), *([str(worker)] if kind == "trials" else [])]
    parent = subprocess.Popen([sys.executable, *launcher, *arguments])
    _wait_until(lambda: len([path for path in found.iterdir() if path.name.isdigit()]) == count)
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


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent is gone")
def test_workers_of_a_loader_end_with_a_parent_killed_in_their_first_second(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(_LOADER)
    parent = subprocess.Popen([sys.executable, str(tmp_path / "script.py")])
    loading = psutil.Process(parent.pid)
    children: list[psutil.Process] = []

    def started() -> bool:
        children[:] = [each for each in loading.children() if "spawn_main" in " ".join(each.cmdline())]
        return len(children) == 2

    _wait_until(started)
    parent.kill()
    parent.wait()
    _wait_until(lambda: not any(_lives(str(child.pid)) for child in children))


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
