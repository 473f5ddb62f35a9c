"""Small training runs on the tiny models and data, and two processes in which many of them go one after the other."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

import pytest

from llava_npu.config import RunConfig
from llava_npu.distributed.launching import meeting_port
from support import tiny

TESTS = Path(__file__).resolve().parents[1]


def skip_off_the_cpu() -> NoReturn:
    """Leaves out what is the same on all devices, where one is enough."""
    pytest.skip("is tested on the CPU; --exhaustive runs it on other devices")


def write_material(folder: Path) -> Path:
    """Writes what small runs are made of: the tiny `lm`, `clip` and `siglip`, `captions.json` and `train.json`."""
    tiny.write_language_model(folder / "lm")
    tiny.write_clip(folder / "clip")
    tiny.write_siglip(folder / "siglip")
    tiny.write_captions(folder)
    tiny.write_records(folder)
    return folder


def small_run(material: Path, output: Path, device_type: str, **changes: Any) -> RunConfig:
    """A small run; keyword arguments change it, sections as dictionaries."""
    finetune = changes.get("stage", "finetune") == "finetune"
    values: dict[str, Any] = {
        "output": str(output),
        "stage": "finetune",
        "model": {"vision_tower": str(material / "clip"), "language_model": str(material / "lm")},
        "data": {"path": str(material / ("train.json" if finetune else "captions.json")), "workers": 0},
        "optimizer": {"learning_rate": 2e-3},
        "batch_size": 8,
        "micro_batch_size": 8,
        "max_steps": 6,
        "epochs": 4,
        "device": device_type,
        "precision": "fp32",
    }
    for key, value in changes.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) and key in values else value
    return RunConfig.model_validate(values)


def in_two_processes(
    folder: Path, runs: dict[str, RunConfig], stop_after: dict[str, int] | None = None, timeout: float = 900
) -> dict[str, str]:
    """Trains each of `runs` in two processes, one run after the other; starting processes costs more than a small run.

    Args:
        stop_after: runs in which the first process gets SIGTERM after so many steps.

    Returns:
        What each run raised, if anything, on the process that raised it first.
    """
    folder.mkdir(parents=True)
    jobs = {
        name: {"config": run.model_dump(mode="json"), "stop_after": (stop_after or {}).get(name)}
        for name, run in runs.items()
    }
    (folder / "jobs.json").write_text(json.dumps(jobs))
    port = meeting_port()
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
    }
    environment["PYTHONFAULTHANDLER"] = "1"
    environment.setdefault("ASCEND_HOME_PATH", str(folder))  # what CANN's set_env.sh sets, and DeepSpeed asks for
    inherited = os.environ.get("PYTHONPATH")
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), *([inherited] if inherited else [])])
    command = [sys.executable, "-m", "support.small_run", str(folder)]
    started = [
        subprocess.Popen(
            command,
            env={**environment, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in "01"
    ]
    try:
        said = [process.communicate(timeout=timeout)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    codes = [process.returncode for process in started]
    # From the first error on, and not all of it: a report that is cut keeps what went wrong first.
    assert codes == [0, 0], "\n".join(
        f"process {rank} ended with {codes[rank]}: {said[rank][max(said[rank].find('Traceback'), 0) :][:4000]}"
        for rank in (0, 1)
    )
    raised = [json.loads((folder / f"raised-{rank}.json").read_text()) for rank in "01"]
    return {name: raised[0].get(name) or raised[1][name] for name in {**raised[0], **raised[1]}}


def _one_process(folder: Path) -> None:
    from rich.console import Console

    from llava_npu import devices
    from llava_npu.distributed import processes
    from llava_npu.models import loading
    from llava_npu.training import trainer as loop
    from llava_npu.training.monitoring import monitor
    from llava_npu.training.nonfinite import guard

    rank = os.environ["RANK"]
    jobs = json.loads((folder / "jobs.json").read_text())
    raised: dict[str, str] = {}
    add = guard.NonFiniteGuard.add
    loading.check_finite = lambda *_, **__: None  # some runs are about steps that are not finite
    device = devices.select(next(iter(jobs.values()))["config"]["device"])
    with processes.join(device, needs_group=True):
        for name, job in jobs.items():

            def noted(guard: Any, step: int, norm: Any, last: int | None = job["stop_after"]) -> None:
                add(guard, step, norm)
                if step == last and rank == "0":
                    os.kill(os.getpid(), signal.SIGTERM)

            guard.NonFiniteGuard.add = noted
            monitor.Plotter.draw_if_due = loop.draw_plots = lambda *_: None
            try:
                loop.train(RunConfig.model_validate(job["config"]), console=Console(quiet=True))
            except Exception as error:  # noqa: BLE001  for the test to look at
                raised[name] = f"{type(error).__name__}: {error}"
                traceback.print_exc()
    (folder / f"raised-{rank}.json").write_text(json.dumps(raised))


if __name__ == "__main__":
    _one_process(Path(sys.argv[1]))
