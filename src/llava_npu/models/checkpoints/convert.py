"""Converting a checkpoint from any layout that is known to another; what a folder holds is told from its content."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llava_npu.errors import UserError
from llava_npu.files.atomic import write_folder
from llava_npu.files.cache import build_once, cache_root, digest_of
from llava_npu.files.home import expand_home
from llava_npu.files.json_objects import read_json
from llava_npu.hub.folders import check_model_folder, open_part
from llava_npu.models.adapters import BASE
from llava_npu.models.checkpoints.checkpoint import Checkpoint
from llava_npu.models.checkpoints.hugging_face import is_hugging_face, read_hugging_face, write_hugging_face
from llava_npu.models.checkpoints.official import is_official, parts_of_official, read_official
from llava_npu.models.checkpoints.official_writing import write_official
from llava_npu.models.checkpoints.weight_files import SHARD_BYTES
from llava_npu.models.sources import MODEL_FOLDER, model_fingerprint

Target = Literal["hf", "official"]
_FORMAT = 2  # part of the name of a converted copy: raise it when the same model is converted otherwise than before


@dataclass(frozen=True)
class Help:
    """What a folder of official LLaVA's leaves open.

    Attributes:
        base: folder of the language model, for a projector alone or LoRA weights.
        vision_tower: folder or hub id of the vision tower. When writing official LLaVA's layout, the name to write.
        template: conversation template that the model was trained with.
    """

    base: str | None = None
    vision_tower: str | None = None
    template: str | None = None


def convert(
    source: str, destination: Path, to: Target, help: Help | None = None, shard_bytes: int = SHARD_BYTES
) -> str:
    """Converts a checkpoint; the destination appears whole or not at all, and one shard is in memory at a time.

    Returns:
        What the source was: "hf", "llava-npu" or "official".

    Raises:
        UserError: the source is not known or damaged, the destination is not empty, or the disk too full.
    """
    help = help or Help()
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise UserError(f"{destination}: exists and is not empty. Give a new folder.")
    checkpoint = open_checkpoint(source, help)
    _check_space(destination, checkpoint.num_bytes)

    def fill(folder: Path) -> None:
        if to == "hf":
            write_hugging_face(checkpoint, folder, shard_bytes)
        else:
            named = None if checkpoint.layout == "official" else help.vision_tower
            write_official(checkpoint, folder, shard_bytes, destination, named)

    write_folder(destination, fill)
    return checkpoint.layout


def open_checkpoint(source: str, help: Help) -> Checkpoint:
    """Opens a checkpoint of any layout.

    Raises:
        UserError: the folder's content is of no layout that is known.
    """
    folder = _folder(source)
    if (folder / BASE).is_file():
        raise UserError(f"{folder}: holds adapters. Merge them first: llava-npu merge {folder} NEW_FOLDER")
    values = read_json(folder / "config.json")
    if is_hugging_face(values):
        if help.base or help.template:
            raise UserError(f"{folder}: is of Hugging Face's layout; --base and --template are for official LLaVA's.")
        return read_hugging_face(folder)
    if is_official(folder, values):
        return open_part(
            lambda: read_official(folder, help.base, help.vision_tower, help.template), "model", str(folder)
        )
    raise UserError(
        f"{folder}: is not a LLaVA model. Its config.json has neither vision_config and text_config (Hugging Face, "
        "llava-npu) nor mm_vision_tower (official LLaVA), and there is no mm_projector.bin."
    )


def as_hugging_face(folder: Path, report: Callable[[str], None], template: str | None = None) -> Path:
    """The folder itself if it is of Hugging Face's layout, else a converted copy in the user's cache.

    `template` is the conversation template of a model of official LLaVA's, as in `Help`.

    Raises:
        UserError: as `convert`.
    """
    path = folder / "config.json"
    if not path.is_file() or is_hugging_face(values := read_json(path)) or not is_official(folder, values):
        return folder
    parts = [model_fingerprint(part) for part in parts_of_official(folder, values)]
    copy = cache_root() / "converted" / digest_of(_FORMAT, template, *parts)

    def build(target: Path) -> None:
        report(f"{folder} is of official LLaVA's layout; a copy in Hugging Face's is made once, in {copy}")
        checkpoint = open_checkpoint(str(folder), Help(template=template))
        report(f"its conversation template is {checkpoint.processor.template!r}; --template gives another")
        _check_space(copy, checkpoint.num_bytes)
        write_hugging_face(checkpoint, target, SHARD_BYTES)

    return build_once(copy, build, _is_whole)


def _is_whole(folder: Path) -> bool:
    try:
        check_model_folder(folder, "converted")
    except UserError:
        return False
    return True


def _folder(source: str) -> Path:
    folder = expand_home(source)
    if not folder.is_dir():
        raise UserError(f"{source}: is not a folder.")
    if not (folder / "config.json").is_file() and (folder / MODEL_FOLDER / "config.json").is_file():
        return folder / MODEL_FOLDER
    return folder


def _check_space(destination: Path, needed: int) -> None:
    existing = next(parent for parent in (destination, *destination.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"{destination}: needs about {needed / 2**30:.1f} GiB, but its disk has {free / 2**30:.1f} GiB free. Free "
            "some space, or choose another folder."
        )
