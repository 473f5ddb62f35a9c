"""The contract with the real package: does the stand-in have its signatures, and do our calls fit them?

The wheel of the pinned version is downloaded once and read as an archive. It is never installed: it needs CANN
libraries to be imported, and once installed it breaks `import torch` without them.
"""

from __future__ import annotations

import ast
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
import yaml
from filelock import FileLock

from torch_npu.simulation import recording

VERSION = "2.13.0"
WHEEL = f"torch_npu-{VERSION}-cp311-cp311-manylinux_2_28_x86_64.whl"
SHA256 = "0deb809cf447d3fce636ccfdc9c9f874950f1fe76f18f4aaab31e2d345f7dac0"
# One fixed build, whatever runs here: schemas do not depend on the platform.
TARGET = ["--python-version=3.11", "--implementation=cp", "--abi=cp311", "--platform=manylinux_2_28_x86_64"]
SCHEMA_FILE = "torch_npu/csrc/aten/npu_native_functions_by_codegen.yaml"
SECTIONS = ("custom", "symint")  # of torch_npu itself; the others hold torch's operators
DEVICE_MODULE = "torch_npu/npu/__init__.py"
DOWNLOAD_TIMEOUT = 300  # seconds

# Types that a recorded argument may have where the schema asks for the key.
ACCEPTED = {
    "Tensor": {"Tensor"},
    "float": {"float", "int"},
    "int": {"int", "SymInt"},
    "bool": {"bool"},
    "str": {"str"},
    "List[int]": {"int[]", "SymInt[]", "(SymInt, int)[]", "[]"},
}


class WheelUnavailableError(RuntimeError):
    """The real wheel could not be had (no network, no such version on the index)."""


def wheel_path() -> Path:
    """The wheel in the user's cache, downloaded first if need be."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = root / "llava-npu" / "torch-npu-wheel"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / WHEEL
    with FileLock(f"{path}.lock"):
        if not path.exists():
            _download(path)
    return path


def _download(path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as unfinished:
        requirement = f"torch-npu=={VERSION}"
        command = [sys.executable, "-m", "pip", "download", requirement, "--no-deps", "--only-binary=:all:", *TARGET]
        try:
            result = subprocess.run(
                [*command, "--quiet", "--dest", unfinished],
                capture_output=True,
                text=True,
                timeout=DOWNLOAD_TIMEOUT,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise WheelUnavailableError(f"{requirement}: no answer within {DOWNLOAD_TIMEOUT} s") from error
        downloaded = Path(unfinished) / WHEEL
        if result.returncode != 0 or not downloaded.exists():
            reason = result.stderr.strip().splitlines()[-1:] or ["pip gave no reason"]
            raise WheelUnavailableError(f"{requirement} cannot be downloaded: {reason[0]}")
        found = hashlib.sha256(downloaded.read_bytes()).hexdigest()
        if found != SHA256:
            raise RuntimeError(f"{WHEEL} has sha256 {found}, expected {SHA256}")
        downloaded.replace(path)


def real_schemas() -> dict[str, str]:
    """Operator name -> schema text, for every operator `torch_npu` exposes under its plain name."""
    with zipfile.ZipFile(wheel_path()) as wheel:
        text = wheel.read(SCHEMA_FILE).decode()
    sections = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    schemas: dict[str, str] = {}
    for section in SECTIONS:
        for entry in sections[section]:
            schema = entry["func"] if isinstance(entry, dict) else entry
            name = schema.partition("(")[0]
            if "." not in name:  # overloads (`.out`) are not what users call
                schemas.setdefault(name, schema)
    return schemas


def real_device_names() -> set[str]:
    """The names that `torch_npu.npu` of the real wheel exports."""
    with zipfile.ZipFile(wheel_path()) as wheel:
        tree = ast.parse(wheel.read(DEVICE_MODULE))
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return set(ast.literal_eval(node.value))
    raise RuntimeError(f"{DEVICE_MODULE} of {WHEEL} has no __all__")


def check_recorded_calls(folder: Path, schemas: Mapping[str, str]) -> list[str]:
    """Binds every fused call recorded in `folder` to the schema of its operator; returns what does not fit."""
    return [
        f"{call.operator}{(*call.positional, *(f'{n}: {t}' for n, t in call.keywords.items()))}: {problem}"
        for call in recording.read(folder)
        for problem in binding_problems(call, schemas)
    ]


def binding_problems(call: recording.FusedCall, schemas: Mapping[str, str]) -> list[str]:
    if call.operator not in schemas:
        return [f"torch_npu {VERSION} has no such operator"]
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
