"""The recipes that come with the package, by name."""

from __future__ import annotations

from pathlib import Path

from llava_npu.errors import UserError, nearest

_FOLDER = Path(__file__).resolve().parent.parent / "recipes"


def recipes() -> dict[str, Path]:
    """Every training recipe's file, by its name."""
    files = sorted(_FOLDER.glob("*.yaml"))
    return {file.stem: file for file in files if not file.stem.startswith("compare-")}


def comparisons() -> dict[str, Path]:
    """Every comparison's file, by its name."""
    return {file.stem: file for file in sorted(_FOLDER.glob("compare-*.yaml"))}


def find_recipe(name: str) -> Path:
    """The file that `name` means: a path, or the name of a recipe.

    Raises:
        UserError: it is neither.
    """
    return _find(name, recipes())


def find_comparison(name: str) -> Path:
    """As `find_recipe`, for comparisons."""
    return _find(name, comparisons())


def _find(name: str, known: dict[str, Path]) -> Path:
    if Path(name).is_file() or name.endswith((".yaml", ".yml")):
        return Path(name)
    if name not in known:
        raise UserError(
            f"{name}: there is no such configuration file, and no recipe of that name.{nearest(name, known)} Recipes: "
            f"{', '.join(known)}."
        )
    return known[name]
