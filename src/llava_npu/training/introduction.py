"""What a run says, and the disk space it asks for, before its first step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
from torch import nn

from llava_npu.config import RunConfig
from llava_npu.ops.fuse import FusedModules
from llava_npu.training.optimizer import schedule
from llava_npu.training.parts import trained_parameters
from llava_npu.training.resolve import ResolvedRun


def introduction(run: ResolvedRun, model: nn.Module, num_processes: int, num_steps: int, dtype: torch.dtype) -> str:
    """One line: what is trained, on what, in which numbers, for how many steps."""
    config = run.config
    trained = sum(parameter.numel() for _, parameter in trained_parameters(model))
    total = sum(parameter.numel() for parameter in model.parameters())
    count = "1 step" if num_steps == 1 else f"{num_steps} steps"
    return (
        f"[bold]{config.stage}[/] on {num_processes} × {run.device.name}, {str(dtype).removeprefix('torch.')}: "
        f"{trained / 1e6:,.1f} M of {total / 1e6:,.1f} M parameters, {count} of {config.batch_size} samples → "
        f"{config.output}"
    )


def fused_operations(fused: FusedModules) -> str | None:
    """What runs as one operator on this device, and what does not though it looks as if it could; None: neither."""
    if not fused.fused and not fused.left:
        return None
    done = Counter(module.operation for module in fused.fused)
    left = Counter((module.operation, module.reason) for module in fused.left)
    line = "fused operators: " + (", ".join(f"{count} × {name}" for name, count in done.items()) or "none")
    return "; ".join([line, *(f"not fused: {count} × {name} ({reason})" for (name, reason), count in left.items())])


def remarks(config: RunConfig, num_steps: int, num_samples: int) -> Iterator[str]:
    """What somebody with little data may not expect."""
    if num_samples < config.batch_size:
        yield f"batch_size is {config.batch_size}, the data {num_samples} samples: a step sees each more than once"
    if not any(schedule(step, num_steps, config.optimizer.warmup_ratio) for step in range(num_steps)):
        yield (
            "the only step is warmup, with a learning rate of 0: nothing is learned. "
            "Take more data or epochs, a smaller batch_size, or optimizer.warmup_ratio=0"
        )


def disk_needed(model: nn.Module, config: RunConfig) -> int:
    """Bytes: checkpoints (weights and two moments of what is trained), and the final model.

    One checkpoint more than are kept is there while one is saved, and another where the best one is kept too.
    """
    trained = sum(parameter.numel() * 4 for _, parameter in trained_parameters(model))
    whole = 4 * sum(parameter.numel() for parameter in model.parameters())  # it is written in float32
    checkpoints = config.keep_checkpoints + 1 + (config.data.validation is not None)
    return 3 * trained * checkpoints + (trained if config.has_adapters else whole)
