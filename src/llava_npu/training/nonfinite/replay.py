"""A step that was not finite, once more: the batch that a stopped run saved, on the weights that it stopped with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llava_npu.config import RunConfig, validate
from llava_npu.devices import Device
from llava_npu.errors import UserError
from llava_npu.ops.fuse import install_kernels
from llava_npu.training.checkpointing.checkpoints import checkpoints, newest
from llava_npu.training.checkpointing.export import build_model
from llava_npu.training.checkpointing.saving import load_weights
from llava_npu.training.loss import SupervisedLoss
from llava_npu.training.monitoring.jsonl import REPLAYS
from llava_npu.training.nonfinite.guard import describe, load_batch
from llava_npu.training.nonfinite.search import find_nonfinite
from llava_npu.training.parts import Precision, compute_dtype, kept_types, place_weights, prepare_parts
from llava_npu.training.run_folder import RUN_FILE, read_run_file


def replay(folder: Path, device: Device, precision: Precision | None, say: Callable[[str], None]) -> bool:
    """Computes the last batch that a run saved, and says where numbers stop being finite.

    Args:
        folder: the run's.
        precision: None: the run's own.

    Returns:
        Whether all numbers were finite.

    Raises:
        UserError: the folder holds no such batch or no checkpoint.
    """
    batches = sorted((folder / REPLAYS).glob("step-*"))
    if not batches:
        raise UserError(
            f"{folder} holds no batch to replay: one is saved when a run stops over gradients that are not finite."
        )
    checkpoint = newest(checkpoints(folder), say)
    if checkpoint is None:
        raise UserError(f"{folder} holds no complete checkpoint; the weights that the batch belongs to are gone.")
    description = read_run_file(folder)
    config = validate(RunConfig, description["config"], str(folder / RUN_FILE))
    dtype = compute_dtype(precision or config.precision, device)

    model = build_model(config, mapped=True).model
    prepare_parts(model, config.resolved_parts, dtype, config.recomputed_layers, config.lora)
    load_weights(checkpoint.path, model)
    place_weights(model, device.torch_device, kept_types(model, dtype))
    install_kernels(model, device.torch_device)
    say(
        f"{batches[-1].name} on the weights after step {checkpoint.step}, in {str(dtype or torch.float32)[6:]} "
        f"on {device.name}"
    )
    passes, fine = _Bare(SupervisedLoss(model), dtype), True
    for file in sorted(batches[-1].glob("*.safetensors")):
        micro_batches = load_batch(file)
        supervised = max(sum(micro_batch.supervised_tokens for micro_batch in micro_batches), 1)
        finding = find_nonfinite(passes, model, micro_batches, supervised, device.torch_device)
        model.zero_grad(set_to_none=True)
        say(f"{file.stem}: {'all numbers are finite' if finding is None else describe(finding)}")
        fine = fine and finding is None
    return fine


class _Bare:
    """Passes of a model that no engine holds."""

    def __init__(self, objective: nn.Module, dtype: torch.dtype | None) -> None:
        self._objective = objective
        self._dtype = dtype
        self._device_type = next(objective.parameters()).device.type

    def loss(self, batch: Mapping[str, Any], sequence_lengths: tuple[int, ...]) -> torch.Tensor:
        with torch.autocast(self._device_type, dtype=self._dtype, enabled=self._dtype is not None):
            loss: torch.Tensor = self._objective(batch, sequence_lengths)
        return loss

    def micro_step(self, last: bool) -> AbstractContextManager[object]:
        return nullcontext()

    def backward(self, part: torch.Tensor) -> None:
        part.backward()
