"""The only place that knows hardware: one object per kind of device, chosen once, passed to whoever needs it.

    device = devices.select("auto")      # NPU, then CUDA, then CPU
    devices.apply_environment(device, print)
    model.to(device.torch_device)

Adding a kind is one file with a `Device` and one line in `_KINDS`.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from llava_npu.devices.base import Device, Variable
from llava_npu.devices.cpu import CpuDevice, share_host_threads
from llava_npu.devices.cuda import CudaDevice
from llava_npu.devices.npu import NpuDevice
from llava_npu.errors import UserError, nearest

__all__ = [
    "Device",
    "Variable",
    "apply_environment",
    "current",
    "find",
    "kinds",
    "of_kind",
    "select",
    "share_host_threads",
]

_KINDS: dict[str, Callable[[], Device]] = {"npu": NpuDevice, "cuda": CudaDevice, "cpu": CpuDevice}  # by preference
_current: Device | None = None
_set_here: dict[str, Variable] = {}  # environment variables that this process has set


def kinds() -> list[str]:
    """Names of all kinds of device, the preferred first."""
    return list(_KINDS)


def of_kind(kind: str) -> Device:
    """The device of a kind, neither chosen nor touched: to ask whether there is one."""
    return _KINDS[kind]()


def select(name: str = "auto") -> Device:
    """Chooses the device of this process, and makes it the one that `current()` gives.

    Sets the environment variables that the device works better with, where the user has set nothing, before anything
    touches the device: allocators and communication libraries read theirs once, at the first use. torch's threads on
    the host become this process's share of the cores that it may use.

    Args:
        name: "auto" (NPU, then CUDA, then CPU), a kind, or a kind with an index, as in "npu:1".

    Raises:
        UserError: no such kind, or this machine has none; the message says what was found.
    """
    global _current
    device = find(name)
    index = name.partition(":")[2]
    _set_variables(device)
    share_host_threads()
    device.use(int(index or device.default_index()))
    _current = device
    return device


def find(name: str = "auto") -> Device:
    """As `select`, but the device is neither chosen nor touched."""
    kind, _, index = name.partition(":")
    if kind != "auto" and kind not in _KINDS:
        allowed = ["auto", *_KINDS]
        raise UserError(f"device {name!r}: allowed are {', '.join(allowed)}.{nearest(kind, allowed)}")
    if index and not index.isdigit():
        raise UserError(f"device {name!r}: what follows the colon is a number, as in '{kind}:0'.")
    candidates = {each: make() for each, make in _KINDS.items() if kind in ("auto", each)}
    for device in candidates.values():
        if device.is_available():
            return device
    reason = candidates[kind].why_unavailable()
    found = [each for each, make in _KINDS.items() if make().is_available()]
    raise UserError(
        f"device {name!r} is not available: {reason}\nFound here: {', '.join(found)}. Use --device {found[0]}."
    )


def current() -> Device:
    """The device of this process; chosen automatically if `select` has not been called."""
    return _current or select("auto")


def apply_environment(device: Device, report: Callable[[str], None]) -> None:
    """Says what `select` has set, makes float32 exact, and passes on the device's warnings, one line each.

    Called once where a run starts. Every process of a launch does it; the first one reports.
    """
    _set_variables(device)  # those that only this run has a reason for
    say = report if os.environ.get("RANK", "0") == "0" else lambda line: None
    for variable in device.environment():
        if _set_here.get(variable.name) == variable and os.environ.get(variable.name) == variable.value:
            say(f"{variable.name}={variable.value} ({variable.reason})")
    for setting in device.use_exact_float32():
        say(f"{setting} (float32 is exact, as on a CPU)")
    for warning in device.warnings():
        say(f"warning: {warning}")


def _set_variables(device: Device) -> None:
    for variable in device.environment():
        if variable.name not in os.environ:
            os.environ[variable.name] = variable.value
            _set_here[variable.name] = variable
