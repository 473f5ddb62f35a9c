"""Opening what transformers stores in a folder or on a hub, with one clear error for whatever is wrong with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from llava_npu.errors import UserError
from llava_npu.files.json_objects import read_json

_T = TypeVar("_T")
_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")  # of weights in several files
_WEIGHTS = ("model.safetensors", "pytorch_model.bin", *_INDICES)
_IMAGE_PROCESSORS = ("preprocessor_config.json", "processor_config.json")


def check_configuration(folder: Path, field: str) -> None:
    """Raises `UserError` if it is not a folder, or has no readable configuration."""
    if not folder.is_dir():
        raise UserError(
            f"{field}: {folder} is not a folder. Give a model folder, or a model on a hub such as 'openai/…'."
        )
    read_json(folder / "config.json", field)


def check_model_folder(folder: Path, field: str) -> None:
    """Raises `UserError` if a model folder misses its configuration or any of its weight files."""
    check_configuration(folder, field)
    if missing := missing_file(folder):
        raise UserError(f"{field}: {folder} is not a complete model folder: it has no {missing}.")


def missing_file(folder: Path) -> str:
    """What a model folder lacks: its configuration, all weights, or shards of them; "" if nothing."""
    if (folder / "adapter_config.json").is_file():
        return "" if (folder / "adapter_model.safetensors").is_file() else "adapter_model.safetensors"
    if not (folder / "config.json").is_file():
        return "config.json"
    if not any((folder / name).is_file() for name in _WEIGHTS):
        return f"weights ({', '.join(_WEIGHTS)})"
    for name in _INDICES:
        if (folder / name).is_file():
            shards = sorted(set(read_json(folder / name, "model").get("weight_map", {}).values()))
            return ", ".join(shard for shard in shards if not (folder / shard).is_file())
    return ""


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
            "Give a complete model folder, or a model on a hub."
        ) from error


def open_image_processor(source: str, field: str) -> Any:
    """The image processor in a folder, as it is stored, or `UserError`."""
    from transformers import AutoImageProcessor

    check_any_file(source, _IMAGE_PROCESSORS, field, "image processor")
    return open_part(
        lambda: AutoImageProcessor.from_pretrained(source, backend="pil"), f"{field} (image processor)", source
    )


def check_any_file(source: str | Path, names: tuple[str, ...], field: str, what: str) -> None:
    """Raises `UserError` if a folder holds none of the files in which a tokenizer, say, may be."""
    folder = Path(source)
    if folder.is_dir() and not any((folder / name).is_file() for name in names):
        raise UserError(f"{field}: {folder} has no {what}: none of the files {', '.join(names)} is there.")


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
