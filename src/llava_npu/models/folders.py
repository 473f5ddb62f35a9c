"""Opening what transformers stores in a folder or on a hub, with one clear error for whatever is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from llava_npu.errors import UserError

_T = TypeVar("_T")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def is_local(source: str) -> bool:
    """Whether `source` names a folder here rather than a repository on a hub ("organisation/name")."""
    return Path(source).exists() or source.startswith((".", "/", "~")) or source.count("/") != 1


def check_configuration(source: str, field: str) -> Path:
    """The local model folder `source`; raises `UserError` if it is none, or without a readable configuration."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise UserError(f"{field}: {source} is not a folder. Give a model folder, or a hub id such as 'openai/…'.")
    _read_json(folder / "config.json", field)
    return folder


def check_model_folder(source: str, field: str) -> None:
    """Raises `UserError` if a local model folder misses its configuration or any of its weight files."""
    if not is_local(source):
        return
    folder = check_configuration(source, field)
    if not any((folder / name).is_file() for name in _WEIGHTS):
        raise UserError(f"{field}: {folder} has no weights; expected one of {', '.join(_WEIGHTS)}.")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = sorted(set(_read_json(index, field).get("weight_map", {}).values()))
        missing = [name for name in shards if not (folder / name).is_file()]
        if missing:
            raise UserError(f"{field}: {folder} misses weight files named in {index.name}: {', '.join(missing)}.")


def open_part(load: Callable[[], _T], field: str, source: str) -> _T:
    """Runs `load`, turning what transformers raises about a bad or absent source into one `UserError`."""
    try:
        return load()
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()
        raise UserError(
            f"{field}: cannot load {source}: {reason[0] if reason else type(error).__name__}\n"
            "Give a complete model folder, or a hub id that can be reached (offline, only cached ones can)."
        ) from error


def check_loaded(info: dict[str, Any], field: str, source: str, ignore: tuple[str, ...] = ()) -> None:
    """Raises `UserError` if weights were missing, left over or of another shape; nothing is loaded half."""
    problems = []
    for kind, what in (("missing_keys", "missing"), ("unexpected_keys", "not part of this model")):
        keys = sorted(key for key in info.get(kind) or () if not key.startswith(ignore))
        if keys:
            problems.append(f"{len(keys)} weights are {what}: {', '.join(keys[:6])}{' …' if len(keys) > 6 else ''}")
    for key, found, wanted in sorted(info.get("mismatched_keys") or ()):
        problems.append(f"{key} has shape {tuple(found)} in the file, {tuple(wanted)} in the configuration")
    if problems:
        raise UserError(f"{field}: {source} does not fit its configuration:\n  " + "\n  ".join(problems))


def _read_json(path: Path, field: str) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{field}: {path.parent} has no {path.name}; it is not a complete model folder.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{field}: {path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{field}: {path} should hold a JSON object, found {type(values).__name__}.")
    return values
