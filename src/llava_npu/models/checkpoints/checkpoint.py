"""A whole model in files, whichever layout it came in: what readers give and writers take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from llava_npu.errors import UserError
from llava_npu.hub.folders import open_part
from llava_npu.models.checkpoints.weight_files import check_finite
from llava_npu.models.checkpoints.weight_names import LM_HEAD
from llava_npu.models.configuration import LlavaNpuConfig
from llava_npu.models.modeling import LlavaNpuForConditionalGeneration
from llava_npu.models.processing import LlavaNpuProcessor

Weights = Iterator[tuple[str, torch.Tensor]]


@dataclass(frozen=True)
class Checkpoint:
    """A model, read when it is written.

    Attributes:
        source: where it comes from, for messages.
        layout: what was found there.
        config, processor: as `llava_npu` uses them.
        weights: reads all weights again, one shard in memory at a time, under their hub names.
        num_bytes: about how much they take.
        companions: further files that belong to it (a sentencepiece model, generation settings).
    """

    source: str
    layout: str
    config: LlavaNpuConfig
    processor: LlavaNpuProcessor
    weights: Callable[[], Weights]
    num_bytes: int
    companions: tuple[Path, ...] = ()


def checked(checkpoint: Checkpoint) -> Weights:
    """The weights of a checkpoint, each known to its model, of the right shape and finite, none twice, none missing.

    Raises:
        UserError: as soon as a weight does not fit, or at the end, with the names of those that are missing.
    """
    with torch.device("meta"):
        model = open_part(lambda: LlavaNpuForConditionalGeneration(checkpoint.config), "model", checkpoint.source)
    expected = {name: tuple(tensor.shape) for name, tensor in model.hub_weights(model.state_dict()).items()}
    tied = checkpoint.config.tie_word_embeddings
    seen: set[str] = set()
    for name, tensor in checkpoint.weights():
        if tied and name == LM_HEAD:  # the embedding again
            continue
        if name not in expected:
            raise UserError(
                f"{checkpoint.source}: the weight {name} is not part of the model that its config describes."
            )
        if name in seen:
            raise UserError(f"{checkpoint.source}: the weight {name} is there twice.")
        if tuple(tensor.shape) != expected[name]:
            raise UserError(
                f"{checkpoint.source}: {name} has shape {tuple(tensor.shape)}; its config calls for {expected[name]}."
            )
        check_finite([(name, tensor)], checkpoint.source)
        seen.add(name)
        yield name, tensor
    missing = sorted(expected.keys() - seen)
    if missing:
        shown = ", ".join(missing[:6]) + (" …" if len(missing) > 6 else "")
        raise UserError(f"{checkpoint.source}: {len(missing)} weights are missing: {shown}.")
