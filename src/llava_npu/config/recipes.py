"""The recipes that come with the package, by name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llava_npu.config.loading import load_config
from llava_npu.config.schema import RunConfig
from llava_npu.errors import UserError, nearest
from llava_npu.files.home import expand_home

_FOLDER = Path(__file__).resolve().parent.parent / "recipes"


@dataclass(frozen=True)
class Writer:
    """A run configuration, with the overrides under which it writes what was looked for."""

    path: Path
    overrides: tuple[str, ...]
    run: RunConfig


def recipes() -> dict[str, Path]:
    """Every training recipe's file, by its name."""
    files = sorted(_FOLDER.glob("*.yaml"))
    return {file.stem: file for file in files if not file.stem.startswith("compare-")}


def comparisons() -> dict[str, Path]:
    """Every comparison's file, by its name."""
    return {file.stem: file for file in sorted(_FOLDER.glob("compare-*.yaml"))}


def find_recipe(name: str) -> Path:
    """The file that `name` stands for: a path, or the name of a recipe.

    Raises:
        UserError: it is neither.
    """
    return _find(name, recipes())


def find_comparison(name: str) -> Path:
    """As `find_recipe`, for comparisons."""
    return _find(name, comparisons())


def find_writer(checkpoint: str, folder: Path | None = None, projector: str | None = None) -> Writer | None:
    """The run configuration that writes `checkpoint`, a run folder or the model in it; None if there is none.

    Args:
        folder: where to look; by default the recipes.
        projector: as set next to the checkpoint, by which recipes name their folders.
    """
    overrides = [] if projector is None else [f"model.projector={projector}"]
    wanted = checkpoint.removesuffix("/model").rstrip("/")
    for path in sorted((folder or _FOLDER).glob("*.yaml")):
        for each in ([], overrides) if overrides else ([],):
            try:
                run = load_config(path, each)
            except UserError:
                continue  # of another kind, or broken: its own command says so
            if run.output.rstrip("/") == wanted:
                return Writer(path, tuple(each), run)
    return None


def _find(name: str, known: dict[str, Path]) -> Path:
    path = expand_home(name)
    if path.is_file() or name.endswith((".yaml", ".yml")):
        return path
    if name not in known:
        raise UserError(
            f"{name}: neither a configuration file nor the name of a recipe.{nearest(name, known)} Recipes: "
            f"{', '.join(known)}."
        )
    return known[name]
