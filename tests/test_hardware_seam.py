"""All hardware is reached through `llava_npu.devices` and `llava_npu.ops`: no other file of the product may name an
accelerator's module or device. Prose, docstrings and the package's own name may.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PRODUCT = ROOT / "src" / "llava_npu"
INSIDE_THE_SEAM = (PRODUCT / "devices", PRODUCT / "ops")
WATCHED = (PRODUCT, ROOT / "benchmarks", ROOT / "examples")

ACCELERATORS = {"cuda", "npu"}
MODULES = {"torch.cuda", "torch.npu", "torch_npu"}
DEVICE_STRING = re.compile(r"(cuda|npu)(:.*)?", re.DOTALL)  # "cuda", "npu:0", and the start of f"npu:{index}"
MODULE_STRING = re.compile(r"(torch_npu|torch\.cuda|torch\.npu)(\..*)?")


def violations(source: str) -> list[str]:
    """'line: what' for everything in a Python source that names an accelerator."""
    tree = ast.parse(source)
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings and bare strings
    found = sorted((line, what) for node in ast.walk(tree) for line, what in _in_node(node, prose))
    return [f"{line}: {what}" for line, what in found]


def _in_node(node: ast.AST, prose: set[int]) -> Iterator[tuple[int, str]]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            if _is_accelerator_module(alias.name):
                yield node.lineno, f"import {alias.name}"
    elif isinstance(node, ast.ImportFrom):
        names = [f"{node.module}.{alias.name}" for alias in node.names]
        if any(map(_is_accelerator_module, [node.module or "", *names])):
            yield node.lineno, f"from {node.module} import {', '.join(alias.name for alias in node.names)}"
    elif isinstance(node, ast.Attribute):
        if isinstance(node.value, ast.Name) and node.value.id == "torch" and node.attr in ACCELERATORS:
            yield node.lineno, f"torch.{node.attr}"
        elif node.attr in {"is_cuda", "is_npu"}:
            yield node.lineno, f".{node.attr}"
    elif isinstance(node, ast.Call):
        if isinstance(node.func, ast.Attribute) and node.func.attr in ACCELERATORS:
            yield node.lineno, f".{node.func.attr}(...)"
    elif (
        isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and id(node) not in prose
        and (DEVICE_STRING.fullmatch(node.value) or MODULE_STRING.fullmatch(node.value))
    ):
        yield node.lineno, repr(node.value)


def _is_accelerator_module(name: str) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in MODULES)


def watched_files() -> list[Path]:
    files = [path for folder in WATCHED for path in sorted(folder.rglob("*.py"))]
    return [path for path in files if not any(path.is_relative_to(inside) for inside in INSIDE_THE_SEAM)]


def test_no_file_outside_the_seam_names_an_accelerator() -> None:
    found = [f"{path.relative_to(ROOT)}:{v}" for path in watched_files() for v in violations(path.read_text())]
    assert not found, "reach hardware through llava_npu.devices or llava_npu.ops:\n" + "\n".join(found)


def test_there_are_files_to_watch() -> None:
    assert PRODUCT / "__init__.py" in watched_files()


@pytest.mark.parametrize(
    "line",
    [
        "import torch_npu",
        "import torch.cuda",
        "import torch.cuda.nvtx as nvtx",
        "from torch import cuda",
        "from torch import Tensor, npu",
        "from torch.cuda import empty_cache",
        "from torch_npu.npu import Stream",
        "torch.cuda.synchronize()",
        "seed = torch.npu.manual_seed",
        "x.cuda()",
        "model.npu(0)",
        "if x.is_cuda: pass",
        'x.to("cuda")',
        'torch.device("npu:1")',
        'f"cuda:{rank}"',
        'kinds = {"npu": 1}',
        'importlib.import_module("torch_npu")',
        'sys.modules["torch.cuda"]',
    ],
)
def test_is_caught(line: str) -> None:
    assert violations(line)


@pytest.mark.parametrize(
    "line",
    [
        "import llava_npu",
        "from llava_npu.devices import select",
        "from llava_npu.ops import packed_attention",
        '"""Runs on npu, torch.cuda and cpu alike."""',
        'help = "auto, npu, cuda or cpu"',
        'distribution = "torch-npu"',
        'url = "cudagraphs"',
        'x.to(device)  # never x.to("cuda")',
        "self.cuda_version",
        'devices.select("auto")',
    ],
)
def test_is_fine(line: str) -> None:
    assert violations(line) == []
