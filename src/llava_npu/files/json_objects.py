"""JSON objects: files that hold one, or one per line, read with one clear error; nested ones as flat ones."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from llava_npu.errors import UserError
from llava_npu.files.damage import describe_damage

OF_A_MODEL = "It is not a complete model folder"


def read_json(path: Path, field: str = "", advice: str = OF_A_MODEL) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        field: the setting that led to the file, if any; it begins the message.
        advice: ends the message: what follows from a file that is absent or damaged, or what to do.

    Raises:
        UserError: the file is missing, or something else in it.
    """
    place = f"{field}: " if field else ""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{place}{path.parent} has no {path.name}. {advice}.") from None
    except OSError as error:
        raise UserError(f"{place}{path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        if damage := describe_damage(path):
            raise UserError(f"{place}{path} {damage}. {advice}.") from error
        raise UserError(f"{place}{path} is damaged, not JSON: {error}. {advice}.") from error
    if not isinstance(values, dict):
        raise UserError(f"{place}{path} should hold a JSON object, found {type(values).__name__}. {advice}.")
    return values


def read_json_lines(path: Path, advice: str) -> list[dict[str, Any]]:
    """The JSON objects of a file, one per line; a last line that an interruption cut short is left out.

    Args:
        advice: see `read_json`.

    Returns:
        nothing where the file does not exist.

    Raises:
        UserError: a line holds something else.
    """
    if not path.is_file():
        return []
    objects = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            values = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: is damaged, not JSON: {error}. {advice}.") from error
        if not isinstance(values, dict):
            raise UserError(f"{path}, line {number}: found {type(values).__name__}, not a JSON object. {advice}.")
        objects.append(values)
    return objects


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads(…, object_pairs_hook=unique_keys)`: JSON's own rule is that the last of two equal keys counts.

    Raises:
        ValueError: a key is given twice.
    """
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} is given twice; keep one of them")
    return values


def flatten(values: Mapping[str, Any], whole: Collection[str] = (), prefix: str = "") -> dict[str, Any]:
    """An object without nested ones: their keys are joined by dots. Values of the keys in `whole` stay as they are."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and key not in whole:
            flat |= flatten(value, whole, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
