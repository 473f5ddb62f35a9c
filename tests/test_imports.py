"""Imports of the product point downward through the packages of docs/architecture.md, without circles."""

from __future__ import annotations

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src"
PACKAGE = SOURCE / "llava_npu"


def _floors() -> list[set[str]]:
    """The packages of each floor, the highest first, as the architecture page has them."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    order = re.search(r"Imports point downward only:(.*?)\.\n", text, flags=re.DOTALL)
    assert order is not None
    return [set(re.findall(r"`(\w+)`", floor)) for floor in order[1].split(">")]


def _modules() -> dict[str, Path]:
    names = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        names[".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")] = path
    return names


MODULES = _modules()


def _imports(name: str) -> set[str]:
    """The product's modules that a module imports anywhere: at its top, inside functions, for types only."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            targets = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in targets:
            while target and target not in MODULES:
                target = target.rpartition(".")[0]
            found.add(target)
    return found - {"", name, "llava_npu"}


GRAPH = {name: _imports(name) for name in MODULES}


def _package(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def test_imports_point_downward() -> None:
    rank = {package: floor for floor, packages in enumerate(_floors()) for package in packages}
    assert {"cli", "training", "models", "data", "devices", "errors"} <= set(rank)
    upward = [
        f"{name} imports {other}"
        for name, others in GRAPH.items()
        for other in others
        if rank.get(_package(other), len(rank)) < rank.get(_package(name), -1)
    ]
    assert not upward


def test_no_import_circles() -> None:
    """A package's `__init__` gathers names from its own modules, which may in turn import others through it."""
    modules = {name for name, path in MODULES.items() if path.name != "__init__.py"}
    graph = {name: GRAPH[name] & modules for name in modules}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as circle:
        raise AssertionError(" imports ".join(circle.args[1])) from circle


def test_every_package_has_a_floor() -> None:
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")} - {"debug_size"}
    assert packages | {"errors"} == set().union(*_floors())


def test_test_files_have_distinct_names() -> None:
    """Pytest imports a file by its name, unless its folder is a package."""
    files = [path.name for path in ROOT.glob("tests/**/test_*.py") if not (path.parent / "__init__.py").exists()]
    assert sorted(files) == sorted(set(files))
