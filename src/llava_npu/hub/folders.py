"""Opening what transformers stores in a folder or on a hub, with one clear error for whatever is wrong with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open

from llava_npu.errors import UserError
from llava_npu.files.damage import describe_damage
from llava_npu.files.json_objects import read_json
from llava_npu.files.untrusted import printable

_T = TypeVar("_T")
_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")  # of weights in several files
_WEIGHTS = ("model.safetensors", "pytorch_model.bin", *_INDICES)
_IMAGE_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_SUFFIXES = (".json", ".model", ".jinja", ".txt", ".tiktoken", ".safetensors", ".bin")
_MAX_LAYERS = 2000  # more than any model has; building as many takes minutes, and all memory
_MAX_REASON = 500  # characters of what a library says


def check_configuration(folder: Path, field: str) -> None:
    """Raises `UserError` if it is not a folder, or one with a damaged file or without a readable configuration."""
    if not folder.is_dir():
        raise UserError(
            f"{field}: {folder} is not a folder. Give a model folder, or a model on a hub such as 'openai/…'."
        )
    check_files(folder, field)
    values = read_json(folder / "config.json", field)
    check_num_layers(values, f"{field}: {folder / 'config.json'}")
    if (folder / "generation_config.json").is_file():  # transformers passes over one that is damaged
        read_json(folder / "generation_config.json", field, "Copy it again, or remove it")
    if not values.get("quantization_config"):
        _check_types(folder, field)


def _check_types(folder: Path, field: str) -> None:
    """Raises `UserError` for weights of whole numbers, which transformers would take as they are."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118
                kind = weights.get_slice(name).get_dtype()
                if name.endswith((".weight", ".bias")) and not kind.startswith(("F", "BF")):
                    raise UserError(
                        f"{field}: {path}: the weight {name} is of type {kind}, not of floating-point numbers, and "
                        "config.json has no `quantization_config` that says how to read it. Take the model's plain "
                        "weights."
                    )


def check_num_layers(values: Mapping[str, Any], place: str) -> None:
    """Raises `UserError` for a number of layers, in a config.json or a part of it, that no model has."""
    for part in (values, *(values.get(name) for name in ("vision_config", "text_config"))):
        layers = part.get("num_hidden_layers") if isinstance(part, Mapping) else None
        if isinstance(layers, int) and layers > _MAX_LAYERS:
            raise UserError(f"{place}: `num_hidden_layers` is {layers}; allowed are 1 to {_MAX_LAYERS}.")


def check_model_folder(folder: Path, field: str) -> None:
    """Raises `UserError` if a model folder lacks its configuration or any of its weight files, or one is damaged."""
    check_configuration(folder, field)
    if missing := missing_file(folder):
        raise UserError(f"{field}: {folder} is not a complete model folder: it has no {missing}.")


def check_files(folder: Path, field: str) -> None:
    """Raises `UserError` for a file of a model that is empty, a pointer of Git LFS, or cut short."""
    for path in sorted(folder.iterdir()):
        if path.suffix not in _SUFFIXES or not path.is_file():
            continue
        try:
            damage = describe_damage(path)
            if not damage and path.suffix == ".safetensors":
                with safe_open(path, framework="pt"):  # reads its head, which says how long it is
                    pass
        except (OSError, SafetensorError) as error:
            damage = f"cannot be read ({error}): it is damaged or cut short"
        if damage and not (path.suffix == ".txt" and path.stat().st_size == 0):
            raise UserError(f"{field}: {path} {damage}. Download or copy it again.")


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
            return ", ".join(shard for shard in read_shards(folder / name) if not (folder / shard).is_file())
    return ""


def read_shards(index: Path) -> list[str]:
    """The names of the files over which an index spreads a model's weights.

    Raises:
        UserError: it is not an index.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: is not an index of weights: it has no `weight_map` from weights to files.")
    for file in weight_map.values():
        if not isinstance(file, str) or Path(file).name != file or not file.isprintable():
            raise UserError(f"{index}: `weight_map` names {file!r:.100}, which is not a file of its folder.")
    return sorted(set(weight_map.values()))


def open_part(load: Callable[[], _T], field: str, source: str) -> _T:
    """Runs `load`, turning what transformers raises about a bad or absent source into one `UserError`."""
    try:
        return load()
    except UserError as error:
        if source in str(error) or str(error).startswith(field):
            raise
        raise UserError(f"{field}: {source}: {error}") from error
    except Exception as error:  # of every type, a bare Exception of the tokenizers library included
        raise UserError(
            f"{field}: cannot load {source}: {describe(error)}\nGive a complete model folder, or a model on a hub."
        ) from error


def describe(error: Exception) -> str:
    """What a library says of a bad file, in one line."""
    reason = printable(" ".join(str(error).split()))
    if not isinstance(error, OSError | ValueError | RuntimeError | SafetensorError) or not reason:
        reason = f"{type(error).__name__}: {reason}" if reason else type(error).__name__
    return reason if len(reason) <= _MAX_REASON else f"{reason[:_MAX_REASON]} …"


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
    if not folder.is_dir():
        return
    if not any((folder / name).is_file() for name in names):
        raise UserError(f"{field}: {folder} has no {what}: none of the files {', '.join(names)} is there.")
    check_files(folder, field)


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
