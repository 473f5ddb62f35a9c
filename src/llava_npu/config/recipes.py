"""The recipes in configs/, by name."""

from __future__ import annotations

from pathlib import Path

from llava_npu.errors import UserError, nearest

_FOLDER = Path(__file__).resolve().parent.parent / "recipes"  # configs/, as part of the package


def recipes() -> dict[str, Path]:
    """Every training recipe's file, by its name."""
    files = sorted(_FOLDER.glob("*.yaml"))
    return {file.stem: file for file in files if not file.stem.startswith("compare-")}


def find_recipe(name: str) -> Path:
    """The file that `name` means: a path, or the name of a recipe.

    Raises:
        UserError: it is neither.
    """
    if Path(name).is_file() or name.endswith((".yaml", ".yml")):
        return Path(name)
    known = recipes()
    if name not in known:
        raise UserError(
            f"{name}: there is no such configuration file, and no recipe of that name.{nearest(name, known)} Recipes: "
            f"{', '.join(known)}."
        )
    return known[name]
