"""Runs whose workers have little /dev/shm, as in containers: a mount of its own, of a few hundred KiB."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from llava_npu.config import render_config
from support.small_run import small_run, write_material

_SCRIPT = """
import shutil, subprocess, sys
from pathlib import Path
from typer.testing import CliRunner
from llava_npu.cli import app

if __name__ == "__main__":
    output, *runs = sys.argv[1:]
    for run in runs:
        size, *arguments = run.split()
        subprocess.run(["mount", "-o", f"remount,size={size}", "/dev/shm"], check=True)
        ended = CliRunner().invoke(app, ["train", *arguments])
        print("ended:", type(ended.exception).__name__, ended.exception)
        shutil.rmtree(output, ignore_errors=True)
"""


@pytest.mark.slow
def test_little_shared_memory_is_one_error_before_the_run_and_in_it(tmp_path: Path) -> None:
    inside = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    mount = "mount -t tmpfs -o size=512k tmpfs /dev/shm"
    if sys.platform != "linux" or subprocess.run([*inside, mount], check=False, capture_output=True).returncode:
        pytest.skip("this user may not make a mount namespace")
    material = write_material(tmp_path)
    # One batch alone is 1.2 MB: whether a worker is ahead of the run by another is a matter of luck.
    large = {"batch_size": 128, "micro_batch_size": 128, "epochs": 10, "max_steps": 2}
    run = small_run(material, tmp_path / "run", "cpu", data={"workers": 1}, **large)
    (tmp_path / "run.yaml").write_text(render_config(run))
    (tmp_path / "script.py").write_text(_SCRIPT)
    arguments = f"{tmp_path}/run.yaml"
    # What is refused; what is started all the same and could not start a worker; what becomes full in the first step.
    runs = [f"512k {arguments}", f"512k {arguments} --ignore-plan", f"1100k {arguments} --ignore-plan"]
    ended = subprocess.run(
        [*inside, f'{mount} && exec "$@"', "sh", sys.executable, tmp_path / "script.py", run.output, *runs],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    lines = [line.removeprefix("ended: ") for line in ended.stdout.splitlines() if line.startswith("ended: ")]
    planned, at_the_start, in_a_step = lines
    assert "UserError data.workers: 1 × 1 workers hand images over in shared memory, up to " in planned
    assert "(docker run --shm-size=2g …, or --ipc=host), or set data.workers=0. --ignore-plan starts it" in planned
    too_small = "The shared memory (/dev/shm) through which they hand over batches is too small or full."
    assert at_the_start.startswith(f"UserError data.workers: {too_small}")
    assert in_a_step.startswith("UserError data.workers: ")
    assert too_small in in_a_step
