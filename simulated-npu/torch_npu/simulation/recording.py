"""A record of the fused calls that a run makes: enough to ask whether the real operators would take them.

Every process appends to its own file, so ranks, data loader workers and parallel tests need no lock.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class FusedCall:
    """One call as it was written: argument types in torch's schema language ("Tensor", "int[]", "None", ...)."""

    operator: str
    positional: tuple[str, ...]
    keywords: Mapping[str, str]


_folder: Path | None = None
_written: set[str] = set()


def start(folder: Path) -> None:
    """From now on, writes every distinct fused call of this process and its forks into a file in `folder`."""
    global _folder
    folder.mkdir(parents=True, exist_ok=True)
    _folder = folder
    _written.clear()


def stop() -> None:
    global _folder
    _folder = None


def record(operator: str, args: Iterable[Any], kwargs: Mapping[str, Any]) -> None:
    if _folder is None:
        return
    call = FusedCall(operator, tuple(map(schema_type, args)), {name: schema_type(v) for name, v in kwargs.items()})
    line = json.dumps(asdict(call), sort_keys=True)
    if line in _written:
        return
    _written.add(line)
    with (_folder / f"fused-calls-{os.getpid()}.jsonl").open("a") as file:
        file.write(line + "\n")


def read(folder: Path) -> list[FusedCall]:
    """All distinct calls that the processes of a run recorded in `folder`."""
    lines = {line for path in folder.glob("fused-calls-*.jsonl") for line in path.read_text().splitlines()}
    calls = [json.loads(line) for line in sorted(lines)]
    return [FusedCall(call["operator"], tuple(call["positional"]), call["keywords"]) for call in calls]


def schema_type(value: Any) -> str:
    """The type of a Python argument, spelled as in an operator schema."""
    if isinstance(value, (list, tuple)):
        inner = {schema_type(item) for item in value}
        return f"{inner.pop()}[]" if len(inner) == 1 else f"({', '.join(sorted(inner))})[]" if inner else "[]"
    if isinstance(value, torch.Tensor):
        return "Tensor"
    names = {bool: "bool", int: "int", float: "float", str: "str", type(None): "None", torch.SymInt: "SymInt"}
    return names.get(type(value), type(value).__qualname__)
