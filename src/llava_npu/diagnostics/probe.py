"""A process of its own that imports torch, looks for devices, and tells what it finds, one JSON line at a time.

Run by `trial`, never imported: whatever it touches may crash or hang, and its last line then says where.
"""

from __future__ import annotations

import json
import multiprocessing
from typing import Any

from llava_npu.diagnostics.trial import MARK


def say(**facts: Any) -> None:
    print(MARK + json.dumps(facts), flush=True)


def reason_of(error: BaseException) -> str:
    """What started it, on one line: torch wraps what its backends raise."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split()) or type(error).__name__


def describe_devices(kind: str) -> None:
    """Tells of each device of a kind, or why there is none, and how this process misuses them."""
    from llava_npu import devices

    device = devices.of_kind(kind)
    for warning in device.warnings():
        say(warning=warning)
    if not device.is_available():
        reason = device.why_unavailable()
        say(**({"broken": kind} if device.has_software() else {"absent": kind}), reason=reason)
        return
    import torch

    for index in range(device.count):
        device.use(index)
        memory = device.memory()
        say(
            device=str(device.torch_device),
            name=device.name,
            memory_total=memory.total,
            memory_free=memory.free,
            bfloat16=device.autocast_dtype == torch.bfloat16,
            accelerator=kind != "cpu",
        )


def main() -> None:
    say(stage="import torch")
    try:
        import torch
    except Exception as error:  # noqa: BLE001  a broken installation raises whatever it likes; it is reported
        say(torch_error=reason_of(error))
        return
    say(torch=torch.__version__)
    from llava_npu import devices

    for kind in devices.kinds():
        say(stage=f"use {kind} devices")
        try:
            describe_devices(kind)
        except Exception as error:  # noqa: BLE001  as above
            say(broken=kind, reason=reason_of(error))
    say(stage="", start_method=multiprocessing.get_start_method())


if __name__ == "__main__":
    main()
