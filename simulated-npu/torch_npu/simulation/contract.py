"""The contract with the real package: does the stand-in have its signatures, and do our calls fit them?

What the real package has was read from its wheels, all releases from 2.7.1 on, into `wheels.json`
(`simulated-npu/extract_schemas.py`). No test needs a wheel.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from torch_npu.simulation import recording

DATA = Path(__file__).with_name("wheels.json")
VERSION = "2.13.0"  # whose signatures the stand-in has

# Types that a recorded argument may have where the schema asks for the key.
ACCEPTED = {
    "Tensor": {"Tensor"},
    "float": {"float", "int"},
    "int": {"int", "SymInt"},
    "bool": {"bool"},
    "str": {"str"},
    "List[int]": {"int[]", "SymInt[]", "(SymInt, int)[]", "[]"},
}


@functools.cache
def _data() -> dict[str, Any]:
    data: dict[str, Any] = json.loads(DATA.read_text())
    return data


def releases() -> list[str]:
    """Versions of torch-npu whose wheels were read, the oldest first."""
    return list(_data()["wheels"])


def schemas(release: str) -> dict[str, str]:
    """Operator name -> schema text, of those operators that the product calls or the stand-in has."""
    return {
        name: variant["is"]
        for name, variants in _data()["schemas"].items()
        for variant in variants
        if release in variant["in"] and variant["is"] is not None
    }


def device_names(release: str) -> set[str]:
    """The names that `torch_npu.npu` exports."""
    return {name for variant in _data()["names"] if release in variant["in"] for name in variant["is"]}


def check_recorded_calls(folder: Path) -> list[str]:
    """Binds every fused call recorded in `folder` to its schema in every release; returns what does not fit."""
    by_release = {release: schemas(release) for release in releases()}
    problems: dict[str, list[str]] = {}
    for call in recording.read(folder):
        arguments = (*call.positional, *(f"{name}: {kind}" for name, kind in call.keywords.items()))
        for release, known in by_release.items():
            for problem in binding_problems(call, known):
                problems.setdefault(f"{call.operator}{arguments}: {problem}", []).append(release)
    return [f"{problem} (torch-npu {', '.join(where)})" for problem, where in problems.items()]


def binding_problems(call: recording.FusedCall, schemas: Mapping[str, str]) -> list[str]:
    if call.operator not in schemas:
        return ["there is no such operator"]
    arguments = torch._C.parse_schema(schemas[call.operator]).arguments
    positional = [argument for argument in arguments if not argument.kwarg_only]
    by_name = {argument.name: argument for argument in arguments}
    problems = []
    if len(call.positional) > len(positional):
        problems.append(f"{len(call.positional)} positional arguments, it takes {len(positional)}")
    given = {argument.name: kind for argument, kind in zip(positional, call.positional, strict=False)}
    for name, kind in call.keywords.items():
        if name not in by_name:
            problems.append(f"it has no argument {name!r}")
        elif name in given:
            problems.append(f"{name!r} is given twice")
        else:
            given[name] = kind
    missing = [a.name for a in arguments if a.name not in given and not a.has_default_value()]
    if missing:
        problems.append(f"arguments missing: {', '.join(missing)}")
    for name, kind in given.items():
        wanted = str(by_name[name].type)
        optional = wanted.startswith("Optional[")
        core = wanted.removeprefix("Optional[").removesuffix("]") if optional else wanted
        if not (kind in ACCEPTED.get(core, set()) or (optional and kind == "None")):
            problems.append(f"{name!r} is {kind}, it takes {wanted}")
    return problems
