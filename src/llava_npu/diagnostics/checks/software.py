"""Python, libraries, torch: what every machine needs."""

from __future__ import annotations

from collections.abc import Iterator

from llava_npu.diagnostics import compatibility
from llava_npu.diagnostics.compatibility import LIBRARIES, Library
from llava_npu.diagnostics.findings import Finding, error, ok, warning
from llava_npu.diagnostics.machine import Machine


def python(machine: Machine) -> Iterator[Finding]:
    if compatibility.at_least(machine.python, compatibility.PYTHON):
        yield ok("Python", f"Python {machine.python} on {machine.system}")
    else:
        yield error(
            "Python",
            f"Python {machine.python}",
            f"llava-npu needs Python {compatibility.PYTHON} or newer.",
            f"python{compatibility.PYTHON} -m venv .venv && .venv/bin/pip install llava-npu",
        )


def libraries(machine: Machine) -> Iterator[Finding]:
    for library in LIBRARIES:
        yield _library(library, machine.versions[library.name])


def _library(library: Library, version: str | None) -> Finding:
    fix = f"pip install '{library.requirement}'"
    if version is None:
        if library.required:
            return error(library.name, "not installed", "llava-npu cannot run without it.", fix)
        return ok(library.name, f"not installed; needed for {library.purpose} only")
    if compatibility.suits(library, version):
        return ok(library.name, version)
    why = f"llava-npu is made for {library.requirement.removeprefix(library.name)}."
    return (error if library.required else warning)(library.name, version, why, fix)


def torch_import(machine: Machine) -> Iterator[Finding]:
    trial = machine.trial
    if trial.autoload_breaks_torch:
        yield error(
            "torch",
            f"`import torch` fails because it loads torch-npu {machine.versions['torch-npu']} by itself, which is "
            f"broken here: {trial.torch_error}",
            "No program that uses torch works in this environment, on any device.",
            "Fix torch-npu (see the findings about it and CANN). Until then: export TORCH_DEVICE_BACKEND_AUTOLOAD=0, "
            "or pip uninstall torch-npu",
        )
    elif trial.torch is None and machine.versions["torch"]:
        yield error(
            "torch",
            f"`import torch` fails: {trial.torch_error or trial.died}",
            "Nothing works without it.",
            "pip install --force-reinstall --no-cache-dir torch=="
            f"{machine.versions['torch'].partition('+')[0]}, in a fresh virtual environment if that does not help",
        )
    if trial.died and trial.torch:
        yield error(
            "devices",
            f"trying the devices ended early: {trial.died}",
            "A driver or an extension crashes or hangs; training would too.",
            "See whether the device answers (npu-smi info, nvidia-smi) and no other process holds it; check the "
            "versions below. Slow file systems: llava-npu doctor --timeout 300",
        )


def start_method(machine: Machine) -> Iterator[Finding]:
    if machine.trial.start_method == "fork" and any(device.accelerator for device in machine.trial.devices):
        yield ok(
            "worker processes",
            "Python forks workers here; llava-npu spawns its own. In your own code, workers that touch a device must "
            'be spawned too ("Cannot re-initialize NPU in forked subprocess", hiyouga/LLaMA-Factory issue 7447): '
            'multiprocessing.set_start_method("spawn")',
        )
