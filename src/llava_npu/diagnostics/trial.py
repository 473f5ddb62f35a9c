"""Trying torch and the devices in another process, so that a crash or a hang is a fact like any other."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MARK = "llava-npu probe: "  # libraries print what they like on stdout too
_AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"


@dataclass(frozen=True)
class DeviceFacts:
    """One device: torch's name for it, the product's, bytes of memory, and whether it computes in bfloat16."""

    device: str
    name: str
    memory_total: int
    memory_free: int
    bfloat16: bool
    accelerator: bool


@dataclass(frozen=True)
class ProbeResult:
    """What happened.

    Attributes:
        torch: version of the torch that was imported, or None.
        torch_error: why it could not be imported, or "".
        autoload_breaks_torch: whether torch can be imported only with its autoloading of device backends switched off.
        died: what was being done when the process crashed or hung, and how it ended; "" if it did not.
        devices: all that work.
        absent: kinds of device that are not there, with the reason.
        broken: kinds of device whose software is installed and does not work, or failed in use, with the reason.
        warnings: what is wrong with how a process uses its devices.
        start_method: how Python starts worker processes here.
    """

    torch: str | None = None
    torch_error: str = ""
    autoload_breaks_torch: bool = False
    died: str = ""
    devices: tuple[DeviceFacts, ...] = ()
    absent: Mapping[str, str] = field(default_factory=dict)
    broken: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    start_method: str = ""


def try_torch(timeout: float, has_backend: bool) -> ProbeResult:
    """Imports torch and uses each device, for at most `timeout` seconds.

    Args:
        has_backend: whether a package is installed that torch loads by itself; if torch then fails, it is tried again
            without, to tell which of the two is broken.
    """
    trial = _run(timeout, {})
    if trial.torch is None and has_backend and os.environ.get(_AUTOLOAD) != "0":
        alone = _run(timeout, {_AUTOLOAD: "0"})
        if alone.torch is not None:
            reason = trial.torch_error or trial.died
            facts = {**vars(alone), "torch_error": reason, "autoload_breaks_torch": True}
            return ProbeResult(**facts)
    return trial


def _run(timeout: float, environment: Mapping[str, str]) -> ProbeResult:
    # The other process sees the modules that this one sees, whichever way it was started.
    path = os.pathsep.join(part or str(Path.cwd()) for part in sys.path)
    command = [sys.executable, "-P", "-m", "llava_npu.diagnostics.probe"]
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env={**os.environ, "PYTHONPATH": path, **environment},
        start_new_session=True,  # what it started hangs with it, and ends with it
    ) as process:
        try:
            output, complaints = process.communicate(timeout=timeout)
            ending = _how_it_ended(process.returncode, complaints)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            ending = f"no answer within {timeout:g} s"
    return read(output, ending)


def read(output: str, ending: str) -> ProbeResult:
    """The trial that a probe's output describes; `ending` says how it ended if not by itself."""
    facts: dict[str, Any] = {"devices": [], "absent": {}, "broken": {}, "warnings": []}
    stage = "start Python"
    for line in output.splitlines():
        if not line.startswith(MARK):
            continue
        said = json.loads(line.removeprefix(MARK))
        stage = said.pop("stage", stage)
        if "device" in said:
            facts["devices"].append(DeviceFacts(**said))
        elif "absent" in said:
            facts["absent"][said["absent"]] = said["reason"]
        elif "broken" in said:
            facts["broken"][said["broken"]] = said["reason"]
        elif "warning" in said:
            facts["warnings"].append(said["warning"])
        else:
            facts.update(said)
    if ending:
        facts["died"] = f"{stage}: {ending}"
    facts["devices"], facts["warnings"] = tuple(facts["devices"]), tuple(facts["warnings"])
    return ProbeResult(**facts)


def _how_it_ended(returncode: int, complaints: str) -> str:
    if returncode == 0:
        return ""
    if returncode < 0:
        return f"crashed ({signal.Signals(-returncode).name})"
    lines = complaints.strip().splitlines()
    return lines[-1] if lines else f"exit status {returncode}"
