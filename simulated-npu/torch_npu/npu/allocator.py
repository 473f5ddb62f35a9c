"""The allocator's settings: read from the environment once, when a device is first used, and never again.

Sources: `NpuSysCtrl::Initialize` and `NPUCachingAllocator` of Ascend/pytorch, 2.7.1 to master; the end of the process
where both variables are set is that of TorchNPU 26.2 with torch 2.10 and newer.
"""

from __future__ import annotations

import os
import sys

NPU_VARIABLE = "PYTORCH_NPU_ALLOC_CONF"
VARIABLE = "PYTORCH_ALLOC_CONF"

_settings: str | None = None


def read_settings() -> None:
    global _settings
    if _settings is not None:
        return
    if NPU_VARIABLE in os.environ and VARIABLE in os.environ:
        print(f"simulated NPU: {NPU_VARIABLE} and {VARIABLE} are both set", file=sys.stderr, flush=True)
        os._exit(134)
    _settings = os.environ.get(NPU_VARIABLE, os.environ.get(VARIABLE, ""))


def settings() -> str | None:
    """What was read; None before a device was used."""
    return _settings
