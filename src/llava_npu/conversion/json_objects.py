"""Reading a JSON object, with one clear error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llava_npu.errors import UserError


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UserError: there is no such file, or something else in it.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.parent}: has no {path.name}; it is not a complete model folder.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: should hold a JSON object, found {type(values).__name__}.")
    return values
