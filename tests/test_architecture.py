"""The rooms of docs/architecture.md: imports point downward only and never in a circle, lazy ones included."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent / "src"
PRODUCT = ROOT / "llava_npu"
FLOORS = (
    {"cli"},
    {"comparison"},
    {"evaluation", "serving", "planning", "diagnostics", "integrations"},
    {"training", "inference"},
    {"models", "config"},
    {"data"},
    {"hub"},
    {"ops", "devices", "distributed", "files"},
    {"errors"},
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# Outside the floors: what is imported by everyone or only puts other rooms together.
UNRANKED = {"__init__", "__main__", "version", "debug_size"}
LONGEST, MOST_LONG = 60, 9  # functions above 60 lines: none may be added

FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PRODUCT.rglob("*.py"))
}


def imported(path: Path) -> set[str]:
    """The modules of the product that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            while name and name not in FILES:
                name = name.rpartition(".")[0]
            if name and name != "llava_npu" and FILES[name] != path:
                found.add(name)
    return found


IMPORTS = {module: imported(path) for module, path in FILES.items()}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def test_every_room_has_its_floor() -> None:
    assert {room(module) for module in FILES} == FLOOR_OF.keys() | UNRANKED


def test_imports_point_downward() -> None:
    upward = [
        f"{module} imports {other}"
        for module, others in IMPORTS.items()
        for other in others
        if room(module) in FLOOR_OF and room(other) in FLOOR_OF and FLOOR_OF[room(other)] < FLOOR_OF[room(module)]
    ]
    assert not upward, "\n".join(sorted(upward))


def test_no_imports_in_a_circle() -> None:
    """Packages' own `__init__` files, which only name what is inside, are left out."""
    graph = {
        module: {other for other in others if FILES[other].name != "__init__.py"} for module, others in IMPORTS.items()
    }
    circle = find_circle(graph)
    assert not circle, " -> ".join(circle)


def find_circle(graph: dict[str, set[str]]) -> list[str]:
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for other in sorted(graph[module]):
            if circle := walk(other, [*path, module]):
                return circle
        done.add(module)
        return []

    return next((circle for module in graph if (circle := walk(module, []))), [])


def test_a_circle_is_found() -> None:
    assert find_circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert find_circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_no_more_long_functions() -> None:
    long = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for path in FILES.values()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno >= LONGEST  # type: ignore[operator]
    ]
    assert len(long) <= MOST_LONG, "\n".join(long)
