"""How several devices train one model: `ddp`, `fsdp2`, `zero2`, `zero3`, each a file, chosen by `engine`.

An engine places a model on its devices, runs backward passes and optimizer steps over all processes, and gives back
what was trained as whole tensors by name, whichever way it keeps them: checkpoints are the same from every engine and
any number of processes, and each reads them.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator

from llava_npu.config import RunConfig
from llava_npu.training.engines.base import Engine

__all__ = ["Engine", "open_engine"]


def open_engine(config: RunConfig, accelerator: Accelerator, compute_dtype: torch.dtype | None) -> Engine:
    """The engine that a run asks for, in `processes.join`'s processes; its library is imported only now.

    Args:
        compute_dtype: 16-bit type to compute in; None: float32.

    Raises:
        UserError: the engine's library is missing.
    """
    if config.engine == "ddp":
        from llava_npu.training.engines.ddp import DdpEngine

        return DdpEngine(accelerator, compute_dtype)
    if config.engine == "fsdp2":
        from llava_npu.training.engines.fsdp2 import Fsdp2Engine

        return Fsdp2Engine(accelerator, compute_dtype, config.fsdp2)
    from llava_npu.training.engines.zero import ZeroEngine

    return ZeroEngine(accelerator, compute_dtype, int(config.engine[-1]), config.zero, config.optimizer.max_grad_norm)
