"""How several devices train one model: `ddp`, `fsdp2`, `zero2`, `zero3`, each a registered class, chosen by `engine`.

An engine places a model on its devices, runs backward passes and optimizer steps over all processes, and gives back
what was trained as whole tensors by name, whichever way it keeps them: checkpoints are the same from every engine and
any number of processes, and each reads them. It also says what it keeps in memory, for planning.

To add one, write a file with a subclass of `Engine`, registered by `@register(name)`, and import it here.
"""

from __future__ import annotations

from llava_npu.training.engines import ddp, fsdp2, zero  # noqa: F401  registers them, in this order
from llava_npu.training.engines.base import Engine
from llava_npu.training.engines.memory import EngineMemory, ModelSizes
from llava_npu.training.engines.registry import check_engine, engines, find_engine, open_engine, register

__all__ = [
    "Engine",
    "EngineMemory",
    "ModelSizes",
    "check_engine",
    "engines",
    "find_engine",
    "open_engine",
    "register",
]
