"""One training step on tensors without numbers."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from llava_npu.config import RunConfig
from llava_npu.models.configuration import LlavaNpuConfig
from llava_npu.models.modeling import LlavaNpuForConditionalGeneration
from llava_npu.ops.attention.transformers_interface import use_packed_attention
from llava_npu.ops.fake_ops import planned_for
from llava_npu.ops.fuse import fuse, operations_worth_fusing
from llava_npu.planning.tracing import StepTrace, Tracer
from llava_npu.training.loss import SupervisedLoss
from llava_npu.training.parts import kept_types, place_weights, prepare_parts


@dataclass(frozen=True)
class BatchShape:
    """A micro-batch without its content.

    Attributes:
        rows, length: of `input_ids`.
        supervised: positions that are learned from.
        images: how many are encoded; with anyres, tiles.
        sequences: in each row; 1 where samples are padded, several where they are packed.
        cached_features: images come as the tower's output.
        lengths: of the sequences of all rows, one after the other, padding as a sequence of its own; (): as equal as
            can be, without padding.
    """

    rows: int
    length: int
    supervised: int
    images: int
    sequences: int = 1
    cached_features: bool = False
    lengths: tuple[int, ...] = ()

    def part(self, parts: int) -> BatchShape:
        """Of one of several devices that have a part of every row each; images are spread alike.

        Attention is over whole rows then, but of as many heads less: it holds and computes what it would of a part.
        """
        if parts == 1:
            return self
        length, supervised, images = (math.ceil(each / parts) for each in (self.length, self.supervised, self.images))
        sequences = math.ceil(self.sequences / parts)
        return replace(self, length=length, supervised=supervised, images=images, sequences=sequences, lengths=())


def fake_model(
    config: LlavaNpuConfig,
    run: RunConfig,
    compute_dtype: torch.dtype | None,
    checkpointing: bool | int,
    *,
    sharded: bool = False,
) -> LlavaNpuForConditionalGeneration:
    """The model as training prepares it, its weights without numbers; takes no memory.

    Of an anyres model tiles are images of their own here: it is made as one of squares.

    Args:
        run: its parts and adapters are prepared, but no weight is quantised.
        compute_dtype, checkpointing: as for `prepare_parts`.
        sharded: as an engine that shards weights has a layer while it runs: all in `compute_dtype`.
    """
    config = copy.deepcopy(config)
    config.change_resolutions(None)
    with torch.device("meta"):  # where weights are initialised by doing nothing
        model = LlavaNpuForConditionalGeneration(config)
        unquantised = run.lora.model_copy(update={"base_bits": None})
        prepare_parts(model, run.resolved_parts, compute_dtype, checkpointing, unquantised)
        place_weights(model, torch.device("meta"), kept_types(model, compute_dtype))
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        model.tie_weights()
        if sharded and compute_dtype is not None:
            for parameter in model.parameters():
                parameter.data = parameter.data.to(compute_dtype)
    return model


def trace_step(
    model: LlavaNpuForConditionalGeneration, batch: BatchShape, compute_dtype: torch.dtype | None, kind: str
) -> StepTrace:
    """Runs forward and backward pass and the optimizer's step.

    Args:
        model: from `fake_model`.
        compute_dtype: of autocast; None: no autocast.
        kind: of the device whose operations are used: "cpu", "cuda" or "npu".
    """
    use_packed_attention(model)
    fused = fuse(model, torch.device("cpu"), operations_worth_fusing(kind))
    mode = next(model.parameters()).fake_mode
    try:
        with mode, planned_for(kind), Tracer() as tracer:
            return _trace(model, batch, compute_dtype, kind, tracer)
    finally:
        fused.undo()
        model.zero_grad()


def _trace(
    model: LlavaNpuForConditionalGeneration,
    batch: BatchShape,
    compute_dtype: torch.dtype | None,
    kind: str,
    tracer: Tracer,
) -> StepTrace:
    tracer.hold_model(model)
    objective = SupervisedLoss(model)
    # From the last hidden state to the loss, what is made is the logits' business.
    hooks = [
        model.model.register_forward_hook(lambda *_: tracer.count_as("logits")),
        objective.register_forward_hook(lambda *_: tracer.count_as("activations")),
    ]
    try:
        with torch.autocast("cpu", dtype=compute_dtype, enabled=compute_dtype is not None):
            loss = objective(_held(_inputs(model, batch), tracer), _lengths(batch))
        loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
    moments, operations = tracer.take_moments(), dict(tracer.operations)
    inputs = sum(tensor.nbytes for tensor in _inputs(model, batch).values())
    return StepTrace(moments, tracer.now(), inputs, operations)


def _inputs(model: LlavaNpuForConditionalGeneration, batch: BatchShape) -> dict[str, torch.Tensor]:
    rows, length, images, config = batch.rows, batch.length, batch.images, model.config
    tensors = {
        name: torch.empty(rows, length, dtype=torch.long)
        for name in ("input_ids", "labels", "attention_mask", "position_ids")
    }
    tensors["supervised_positions"] = torch.empty(batch.supervised, dtype=torch.long)
    if images:
        tensors["image_positions"] = torch.empty(images * config.num_image_tokens, dtype=torch.long)
        tower = config.tower
        tokens = tower.num_patches + (tower.num_prefix_tokens if config.keep_prefix_tokens else 0)
        if batch.cached_features:
            channels = model.model.multi_modal_projector.input_channels
            dtype = model.model.vision_tower.dtype
            tensors["vision_features"] = torch.empty(images, tokens, channels, dtype=dtype)
        else:
            tensors["pixel_values"] = torch.empty(images, tower.pixels[0], *config.input_size)
    return tensors


def _held(tensors: dict[str, torch.Tensor], tracer: Tracer) -> dict[str, torch.Tensor]:
    for tensor in tensors.values():
        tracer.hold(tensor, "buffers")
    return tensors


def _lengths(batch: BatchShape) -> tuple[int, ...]:
    """Those of the rows' sequences, the padding behind them as another."""
    if batch.lengths:
        return batch.lengths
    share, rest = divmod(batch.length, batch.sequences)
    return (*(share + (number < rest) for number in range(batch.sequences)), 0) * batch.rows
