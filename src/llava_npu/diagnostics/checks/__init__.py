"""What follows from the facts: one function for each thing that goes wrong in practice, from facts to findings.

The traps are those that users of other toolkits ran into; most name a place where that was reported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from llava_npu.diagnostics.checks import ascend, environment, resources, software
from llava_npu.diagnostics.findings import Finding
from llava_npu.diagnostics.machine import Machine

# In the order in which one would look.
CHECKS: tuple[Callable[[Machine], Iterator[Finding]], ...] = (
    software.python,
    software.libraries,
    software.torch_import,
    ascend.torch_npu,
    ascend.cann,
    ascend.driver,
    ascend.health,
    ascend.chips,
    resources.devices,
    ascend.numpy,
    ascend.cann_packages,
    ascend.bitsandbytes,
    ascend.compilation,
    software.start_method,
    environment.visible_devices,
    environment.allocator,
    environment.launch_blocking,
    environment.communication,
    environment.ports,
    resources.cores,
    resources.disk,
)
