"""Where a model's weights come from, as a description that can be written down and followed later."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llava_npu.errors import UserError
from llava_npu.files.home import expand_home
from llava_npu.hub.hubs import is_local
from llava_npu.hub.models import SMALL_FILES

MODEL_FOLDER = "model"  # where a run folder keeps its final model
_WHOLE = 64 * 2**20  # bytes of a file that are read as a whole; of a larger one, samples
_SAMPLE, _STRIDE = 4096, 2**20


_CHANGES = {"image_aspect_ratio", "image_grid_pinpoints", "seed"}  # what `change_aspect_ratio` takes


@dataclass(frozen=True)
class ModelSource:
    """A whole checkpoint, or the parts of a model that is composed.

    Attributes:
        checkpoint: a model folder, a run folder or a hub id.
        changes: how it is to see images from now on, if otherwise: the arguments of `change_aspect_ratio`.
        parts: the arguments of `compose`, without its `dtype`.
        explicit: what the configuration says of the checkpoint's parts, to be checked and no part of the description.
    """

    checkpoint: str | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)
    parts: Mapping[str, Any] = field(default_factory=dict)
    explicit: Mapping[str, Any] = field(default_factory=dict)

    @property
    def locations(self) -> dict[str, str]:
        """The folders and hub ids, each by the name of its key."""
        if self.checkpoint is not None:
            return {"checkpoint": self.checkpoint}
        towers = self.vision_towers
        numbered = {f"vision_tower[{number}]": place for number, place in enumerate(towers)}
        of_towers = numbered if len(towers) > 1 else {"vision_tower": towers[0]}
        return {**of_towers, "language_model": self.parts["language_model"]}

    @property
    def vision_towers(self) -> list[str]:
        """The folders or hub ids of a composed model's tower, or two."""
        named = self.parts["vision_tower"]
        return list(named) if isinstance(named, list | tuple) else [named]

    def absolute(self) -> ModelSource:
        """The same from any working folder."""
        if self.checkpoint is not None:
            return replace(self, checkpoint=_absolute(self.checkpoint))
        towers = [_absolute(place) for place in self.vision_towers]
        parts = {
            "vision_tower": towers if len(towers) > 1 else towers[0],
            "language_model": _absolute(self.parts["language_model"]),
        }
        return replace(self, parts={**self.parts, **parts})


def write_source(path: Path, source: ModelSource) -> None:
    """Writes a description, with fingerprints of local weights, so that others in their place are noticed."""
    source = source.absolute()
    fingerprints = {key: weights_fingerprint(folder) for key, folder in source.locations.items() if is_local(folder)}
    values: dict[str, Any] = {"parts": dict(source.parts)}
    if source.checkpoint is not None:
        values = {"checkpoint": source.checkpoint, "changes": dict(source.changes)}
    path.write_text(json.dumps({**values, "fingerprints": fingerprints}, indent=1) + "\n", encoding="utf-8")


def read_source(path: Path) -> ModelSource:
    """Reads what `write_source` wrote.

    Raises:
        UserError: the file is not of that form, or the weights that it names are gone or are others by now.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        changes, parts = dict(values.get("changes", {})), dict(values.get("parts", {}))
        if unknown := changes.keys() - _CHANGES:
            raise KeyError(f"changes: {', '.join(sorted(unknown))}")
        source = ModelSource(values.get("checkpoint"), changes, parts)
        locations, fingerprints = source.locations, dict(values.get("fingerprints", {}))
        if not all(isinstance(text, str) for text in locations.values()):
            raise TypeError(f"{', '.join(locations)} should be texts")
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read as the description of a base model ({error}).") from error
    for key, location in locations.items():
        if is_local(location) and not Path(location).is_dir():
            raise UserError(
                f"{path}: its adapters belong to {location}, which does not exist. Put it back, or write its "
                f"new place into `{key}` of {path.name}."
            )
        if key in fingerprints and is_local(location) and weights_fingerprint(location) != fingerprints[key]:
            raise UserError(
                f"{path}: the weights in {location} are not those that its adapters were trained on. Put "
                f"the old ones back, or write their place into `{key}` of {path.name}."
            )
    return source


def _weight_files(folder: str) -> list[Path]:
    root = Path(folder).expanduser()
    root = root / MODEL_FOLDER if (root / MODEL_FOLDER).is_dir() else root
    return sorted([*root.glob("*.safetensors"), *root.glob("*.bin")])


def weight_stamps(source: ModelSource) -> dict[Path, tuple[int, int, int]]:
    """What tells that a local weight file has been written to: its inode, its size, the time of its last change."""
    folders = [place for place in source.locations.values() if is_local(place)]
    return {file: _stamp(file) for folder in folders for file in _weight_files(folder)}


def changed_in_place(stamps: Mapping[Path, tuple[int, int, int]]) -> list[Path]:
    """Files that were written to since `weight_stamps`.

    Of one that was deleted, or that another took the place of, what is mapped is still what it was.
    """
    now = {file: _stamp(file) for file in stamps if file.is_file()}
    return [file for file, stamp in now.items() if stamp != stamps[file] and stamp[0] == stamps[file][0]]


def _stamp(file: Path) -> tuple[int, int, int]:
    status = file.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def weights_fingerprint(folder: str) -> str:
    """Of the weight files in a model or run folder: names, sizes, and content (of large files 4 KiB of every MiB)."""
    digest = hashlib.sha256()
    for file in _weight_files(folder):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as stream:
            if size <= _WHOLE:
                digest.update(stream.read())
                continue
            for start in range(0, size, _STRIDE):
                stream.seek(start)
                digest.update(stream.read(_SAMPLE))
    return f"sha256:{digest.hexdigest()}"


def model_fingerprint(folder: str | Path) -> str:
    """Of all that a model's folder holds: its weights (`weights_fingerprint`), configuration, tokenizer, processor."""
    root = expand_home(folder)
    digest = hashlib.sha256(weights_fingerprint(str(root)).encode())
    root = root / MODEL_FOLDER if (root / MODEL_FOLDER).is_dir() else root
    for file in sorted({path for pattern in SMALL_FILES for path in root.glob(pattern)}):
        digest.update(f"{file.name}\n".encode() + hashlib.sha256(file.read_bytes()).digest())
    return f"sha256:{digest.hexdigest()}"


def _absolute(location: str) -> str:
    return str(expand_home(location).resolve()) if is_local(location) else location
