"""A first run configuration for somebody's data and model: what the data holds decides its values, comments say why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llava_npu.config.yaml_reader import write_yaml
from llava_npu.data.formats.parsing import Record
from llava_npu.data.image_roots import exists
from llava_npu.data.records import open_records
from llava_npu.data.tools.defects import RecordError
from llava_npu.errors import UserError

_LOOKED_AT = 1000  # records, evenly over the data
_WITHOUT_IMAGES = 0.9  # of the records: then this is hardly what a vision-language model should learn from
_STEPS = 50  # an epoch has at least this many steps, unless batches would become very small
_SMALLEST_BATCH = 8

Stage = Literal["align", "finetune"]


@dataclass(frozen=True)
class DataSummary:
    """What a look at some records of a data file shows.

    Attributes:
        num_records: of the whole file.
        looked_at, with_images, several_turns: records that were read, and how many of them have images, or more than
            one answer.
    """

    path: Path
    image_root: Path | None
    num_records: int
    looked_at: int
    with_images: int
    several_turns: int

    def __str__(self) -> str:
        text_only = self.looked_at - self.with_images
        return (
            f"{self.path}: {self.num_records:,} records; of {self.looked_at:,} looked at {self.with_images:,} have "
            f"images, {text_only:,} are text only, {self.several_turns:,} have several turns"
        )


def look_at_data(path: Path, image_root: Path | None) -> DataSummary:
    """Reads records evenly over a data file; no image is decoded.

    Raises:
        UserError: the file or one of these records cannot be read, an image is missing, or no record has images.
    """
    records = open_records(path, image_root)
    count = min(len(records), _LOOKED_AT)
    try:
        chosen = [records[index * len(records) // count] for index in range(count)]
    except RecordError as error:
        raise UserError(f"{error}\n`llava-npu data check {path}` lists every record that cannot be used.") from None
    with_images = [record for record in chosen if record.images]
    if not with_images:
        raise UserError(
            f"{path}: none of {count:,} records has an image, so there is nothing to train a vision-language model on. "
            "A record names its file in `image`, and its question contains <image> (docs/data.md)."
        )
    missing = next((image for record in with_images for image in record.image_paths if not exists(image)), None)
    if missing is not None:
        raise UserError(
            f"{path}: the image {missing} does not exist. Images are looked for in "
            f"{image_root or path.parent}; name another folder or archive with --images."
        )
    return DataSummary(path, image_root, len(records), count, len(with_images), sum(map(_has_turns, chosen)))


def _has_turns(record: Record) -> bool:
    return sum(turn.role == "gpt" for turn in record.conversations) > 1


@dataclass(frozen=True)
class NewRun:
    """The answers that `llava-npu init` needs.

    Attributes:
        stage: `align` for a new model, `finetune` for one whose projector is trained.
        checkpoint: a LLaVA model to start from, or
        vision_tower, language_model, projector: the parts of a new one.
        settings: key=value pairs that a plan recommends, as written into the file.
    """

    data: DataSummary
    output: str
    stage: Stage
    device: str
    checkpoint: str | None = None
    vision_tower: str | None = None
    language_model: str | None = None
    projector: str = "mlp2x_gelu"
    settings: Sequence[tuple[str, str]] = ()

    @property
    def batch_size(self) -> int:
        """LLaVA-1.5's, or less where an epoch would have too few steps: a power of two."""
        size = 256 if self.stage == "align" else 128
        while size > _SMALLEST_BATCH and self.data.num_records // size < _STEPS:
            size //= 2
        return size

    def render(self) -> str:
        """The configuration as YAML with comments."""
        align = self.stage == "align"
        usual = 256 if align else 128
        why = "LLaVA-1.5's" if self.batch_size == usual else f"LLaVA-1.5's is {usual}; smaller for more steps"
        lines = [
            "# Written by `llava-npu init`. Every key: docs/configuration.md.",
            f"# {self.data}.",
            f"output: {_text(self.output)}  # checkpoints, metrics and the final model",
            f"stage: {self.stage}  # {_STAGES[self.stage]}",
            *self._model(),
            "data:",
            f"  path: {_text(str(self.data.path))}",
            *([f"  image_root: {_text(str(self.data.image_root))}"] if self.data.image_root else []),
            "  max_length: 2048  # tokens of a sample, images included; longer ones are cut",
            *self._validation(),
            "optimizer:",
            f"  learning_rate: {'1e-3' if align else '2e-5'}  # LLaVA-1.5's for this stage",
            "epochs: 1",
            f"batch_size: {self.batch_size}  # samples per step, over all devices; {why}",
            *[f"{key}: {value}  # recommended by the plan for this machine" for key, value in self.settings],
            f"device: {self.device}",
            "save_every: 500  # steps between checkpoints",
        ]
        return "\n".join(lines) + "\n"

    def _model(self) -> list[str]:
        if self.checkpoint is not None:
            return ["model:", f"  checkpoint: {_text(self.checkpoint)}  # defines tower, projector and template"]
        return [
            "model:",
            f"  vision_tower: {_text(str(self.vision_tower))}",
            f"  language_model: {_text(str(self.language_model))}",
            f"  projector: {self.projector}  # others: docs/projectors.md",
        ]

    def _validation(self) -> list[str]:
        size = min(200, self.data.num_records // 20)
        return [f"  validation: {{size: {size}, every: 100}}  # records never trained on"] if size else []


_STAGES = {
    "align": "trains the projector alone, on captions; then finetune",
    "finetune": "trains the projector and the language model, on conversations",
}


def _text(value: str) -> str:
    return write_yaml(value, width=10**6).removesuffix("...\n").strip()
