"""What a checkpoint holds, for people and programs that look at it from outside of its run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from llava_npu.errors import UserError
from llava_npu.files.json_objects import read_json
from llava_npu.training.checkpointing.checkpoints import TrainingCheckpoint, checkpoint_of, checkpoints
from llava_npu.training.checkpointing.state import PLACE, SavedState, weight_key
from llava_npu.training.monitoring.metrics import read_validation_loss


@dataclass(frozen=True)
class CheckpointSummary:
    """A checkpoint.

    Attributes:
        samples: trained on until then.
        engine, processes: that wrote it.
        weights, parameters: how many tensors are trained, and how many numbers they have.
        moments: whether the optimizer has moved yet.
        num_bytes: of all files.
        shards: the files that hold tensors, each with its size in bytes.
        validation_loss: after this step, where it was computed.
    """

    path: str
    step: int
    samples: int
    engine: str
    processes: int
    weights: int
    parameters: int
    moments: bool
    num_bytes: int
    shards: dict[str, int]
    validation_loss: float | None


def find(folder: Path) -> list[TrainingCheckpoint]:
    """The checkpoints of a run folder, the newest first, or the one that `folder` is.

    Raises:
        UserError: there are none.
    """
    resolved = folder.resolve()
    found = [single] if (single := checkpoint_of(resolved)) else checkpoints(resolved)
    if not found:
        reason = "holds no checkpoint (a finished run keeps its model alone)" if folder.is_dir() else "does not exist"
        raise UserError(f"{folder} {reason}. Give a run folder, or a folder checkpoint-… in one.")
    return found


def describe(checkpoint: TrainingCheckpoint) -> CheckpointSummary:
    """Reads what a checkpoint says of itself, its tensors left out.

    Raises:
        UserError: it is of an earlier version, or a file is missing.
    """
    path, saved = checkpoint.path, SavedState(checkpoint.path)
    place = read_json(path / PLACE, advice="The checkpoint is damaged")
    weights = [shape for name, shape in saved.shapes.items() if name.startswith(weight_key(""))]
    return CheckpointSummary(
        path=str(path),
        step=checkpoint.step,
        samples=checkpoint.step * place.get("samples_per_step", 0),
        engine=place.get("engine", "unknown"),
        processes=place.get("processes", 1),
        weights=len(weights),
        parameters=sum(shape.numel() for shape in weights),
        moments=len(saved.shapes) > len(weights),
        num_bytes=sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
        shards={file.name: file.stat().st_size for file in saved.files()},
        validation_loss=read_validation_loss(path.parent, checkpoint.step),
    )


def as_json(found: Sequence[CheckpointSummary]) -> str:
    return json.dumps([asdict(each) for each in found], indent=1)


def as_text(found: CheckpointSummary) -> str:
    """A few lines for a terminal."""
    loss = "" if found.validation_loss is None else f", validation loss {found.validation_loss:.4f}"
    lines = [
        found.path,
        f"  after step {found.step}, {found.samples:,} samples{loss}",
        f"  written by {found.processes} × {found.engine}; any engine and number of devices reads it",
        f"  {found.parameters / 1e6:,.1f} M trained parameters in {found.weights} tensors, "
        f"{'with' if found.moments else 'without'} optimizer state",
        f"  {found.num_bytes / 2**20:,.1f} MiB: "
        + ", ".join(f"{name} {size / 2**20:,.1f}" for name, size in found.shards.items()),
    ]
    return "\n".join(lines)
