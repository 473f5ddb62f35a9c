"""Extracts from the real torch-npu wheels what the contract tests compare with: `torch_npu/simulation/wheels.json`.

    python simulated-npu/extract_schemas.py 2.14.0     # adds a release
    python simulated-npu/extract_schemas.py            # extracts all releases again, checking their checksums

A wheel is downloaded, read as an archive and thrown away. It is never installed: it needs CANN's libraries to be
imported, and once installed it breaks `import torch` without them.
"""

from __future__ import annotations

import ast
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

DATA = Path(__file__).parent / "torch_npu" / "simulation" / "wheels.json"
# One fixed build, whatever runs here: schemas do not depend on the platform.
TARGET = ["--python-version=3.11", "--implementation=cp", "--abi=cp311", "--platform=manylinux_2_28_x86_64"]
SCHEMA_FILE = "torch_npu/csrc/aten/npu_native_functions_by_codegen.yaml"
SECTIONS = ("custom", "symint")  # of torch_npu itself; the others hold torch's operators
DEVICE_MODULE = "torch_npu/npu/__init__.py"
# Those that the product calls or the simulated device has.
OPERATORS = (
    "npu_fused_infer_attention_score",
    "npu_fusion_attention",
    "npu_incre_flash_attention",
    "npu_prompt_flash_attention",
    "npu_rms_norm",
    "npu_rotary_mul",
    "npu_swiglu",
)


def download(version: str, folder: Path) -> Path:
    requirement = f"torch-npu=={version}"
    command = [sys.executable, "-m", "pip", "download", requirement, "--no-deps", "--only-binary=:all:", *TARGET]
    done = subprocess.run([*command, "--quiet", "--dest", str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{requirement} cannot be downloaded: {done.stderr.strip()}")
    (wheel,) = folder.glob("*.whl")
    return wheel


def schemas(wheel: zipfile.ZipFile) -> dict[str, str]:
    """Operator name -> schema text, for those of `OPERATORS` that `torch_npu` exposes under their plain name."""
    sections = yaml.load(wheel.read(SCHEMA_FILE), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    found: dict[str, str] = {}
    for section in SECTIONS:
        for entry in sections.get(section) or ():
            schema = entry["func"] if isinstance(entry, dict) else entry
            name = schema.partition("(")[0]
            if name in OPERATORS:
                found.setdefault(name, schema)
    return found


def device_names(wheel: zipfile.ZipFile) -> list[str]:
    """The names that `torch_npu.npu` exports."""
    for node in ast.parse(wheel.read(DEVICE_MODULE)).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return sorted(ast.literal_eval(node.value))
    raise RuntimeError(f"{DEVICE_MODULE} of {wheel.filename} has no __all__")


def extract(version: str, expected: str | None) -> dict[str, Any]:
    """What one release has; `expected` is the sha256 that its wheel had before."""
    with tempfile.TemporaryDirectory() as folder:
        path = download(version, Path(folder))
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if expected not in (None, found):
            raise RuntimeError(f"{path.name} has sha256 {found}, expected {expected}")
        with zipfile.ZipFile(path) as wheel:
            return {"file": path.name, "sha256": found, "schemas": schemas(wheel), "names": device_names(wheel)}


def by_content(releases: dict[str, Any], what: str, key: str) -> list[dict[str, Any]]:
    """What releases have in common is written once: its text, and the releases that have it."""
    shared: dict[str, list[str]] = {}
    for version, release in releases.items():
        shared.setdefault(json.dumps(release[what].get(key) if key else release[what]), []).append(version)
    return [{"is": json.loads(text), "in": versions} for text, versions in shared.items()]


def main(versions: Iterable[str]) -> None:
    from packaging.version import Version

    before = json.loads(DATA.read_text())["wheels"] if DATA.exists() else {}
    releases = {}
    for version in sorted({*before, *versions}, key=Version):
        print(version, flush=True)
        releases[version] = extract(version, before.get(version, {}).get("sha256"))
    data = {
        "wheels": {v: {"file": release["file"], "sha256": release["sha256"]} for v, release in releases.items()},
        "schemas": {name: by_content(releases, "schemas", name) for name in OPERATORS},
        "names": by_content(releases, "names", ""),
    }
    DATA.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
