"""One of two processes that have a half of each sequence: what they compute together, next to what one computes alone.

python -m llava_npu.distributed.launching 2 tests/support/split_model.py DEVICE PARTS_FOLDER RESULTS
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image

from llava_npu import devices
from llava_npu.data.dataset import Sample
from llava_npu.distributed import processes
from llava_npu.models import compose
from llava_npu.ops.fuse import install_kernels
from llava_npu.training.batches import WHOLE, MicroBatch, SequenceSplit, micro_batch, part_of
from llava_npu.training.loss import SupervisedLoss

TEXTS = [  # with images that are split between the parts or lie on either side, and text alone
    "<image>\nWhat is it? A red square. <image> And that? A blue one, which follows here.",
    "What is blue?",
    "<image> is that green? It is a green square.",
]


def samples(processor: Any) -> list[Sample]:
    found = []
    for text in TEXTS:
        images = [Image.new("RGB", (30 + 28 * k, 20), (220, 30 * k, 30)) for k in range(text.count("<image>"))]
        encoded = processor(text=[text], images=images or None, return_tensors="pt")
        ids = encoded["input_ids"][0]
        labels = torch.where(torch.arange(len(ids)) % 3 == 0, -100, ids)
        labels = torch.where(ids == processor.image_token_id, -100, labels)
        sizes = tuple((image.height, image.width) for image in images) if processor.tiling is not None else None
        found.append(Sample(ids, labels, encoded.get("pixel_values"), None, "a sample", image_sizes=sizes or None))
    return found


def differences(
    folder: Path, device: torch.device, changes: dict[str, Any], packed: bool, checkpointing: bool = False
) -> dict[str, float]:
    """The largest difference of loss, logits, and gradients, each relative to the largest number there."""
    options = {"image_aspect_ratio": "anyres"} if changes.get("anyres") else {}
    model, processor = compose(str(folder / "clip"), str(folder / changes["lm"]), **options)
    model = model.to(device).train()
    install_kernels(model, device)
    if checkpointing:
        model.gradient_checkpointing_enable()
    given = samples(processor)
    length = sum(len(each.input_ids) for each in given) + 3 if packed else None
    whole = micro_batch(given, length, 0, processor.image_token_id, multiple=2)
    group = processes.neighbours(2)
    split = SequenceSplit(dist.get_rank(), 2)

    def compute(batch: MicroBatch, objective: SupervisedLoss) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        logits: list[torch.Tensor] = []
        hook = model.model.register_forward_hook(
            lambda *call: logits.append(model.lm_head(call[2].last_hidden_state).detach())
        )
        model.zero_grad()
        loss = objective(batch.to(device), batch.sequence_lengths)
        loss.backward()
        hook.remove()
        gradients = [torch.zeros_like(each) if each.grad is None else each.grad.clone() for each in model.parameters()]
        return loss.detach(), logits[0], gradients

    expected = compute(part_of(whole, WHOLE, processor), SupervisedLoss(model))
    loss, logits, gradients = compute(part_of(whole, split, processor), SupervisedLoss(model, sequence_group=group))
    for tensor in (loss, *gradients):
        dist.all_reduce(tensor)
    parts = [torch.empty_like(logits) for _ in range(2)]
    dist.all_gather(parts, logits.contiguous())
    tokens = whole.sample_lengths if not packed else (sum(whole.sample_lengths),)
    real = torch.arange(expected[1].shape[1]) < torch.tensor(tokens)[:, None]
    largest = max(float(each.abs().max()) for each in expected[2])
    return {
        "loss": float((loss - expected[0]).abs() / expected[0].abs()),
        "logits": _difference(torch.cat(parts, 1).cpu()[real], expected[1].cpu()[real]),
        "gradients": max(float((mine - other).abs().max()) for mine, other in zip(gradients, expected[2], strict=True))
        / largest,
    }


def _difference(mine: torch.Tensor, other: torch.Tensor) -> float:
    return float((mine - other).abs().max() / other.abs().max())


def main(kind: str, folder: str, results: str) -> None:
    device = devices.select(kind)
    with processes.join(device, needs_group=True):
        found = {}
        for name, (changes, packed, checkpointing) in CASES.items():
            torch.manual_seed(0)
            found[name] = differences(Path(folder), device.torch_device, changes, packed, checkpointing)
        if dist.get_rank() == 0:
            Path(results).write_text(json.dumps(found))


CASES: dict[str, tuple[dict[str, Any], bool, bool]] = {
    "packed": ({"lm": "lm"}, True, False),
    "padded": ({"lm": "lm"}, False, False),
    "one key-value head": ({"lm": "one"}, True, False),
    "three key-value heads": ({"lm": "three"}, True, False),
    "a head each": ({"lm": "all"}, True, False),
    "sliding window": ({"lm": "window"}, True, False),
    "recomputed": ({"lm": "lm"}, True, True),
    "anyres": ({"lm": "lm", "anyres": True}, True, False),
}

if __name__ == "__main__":
    main(*sys.argv[1:])
