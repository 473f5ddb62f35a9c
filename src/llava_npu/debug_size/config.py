"""What a run becomes at debug size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_npu.config import load_config
from llava_npu.config.comparison import ComparisonConfig
from llava_npu.config.loading import override, validate
from llava_npu.config.schema import RunConfig
from llava_npu.models.projectors.registry import make_options

FOLDER = Path("runs/debug-size")
ASSETS = FOLDER / "assets"
QUESTIONS = "questions.tsv"

_WIDTH = 64  # of projectors that have a width of their own
_RANK = 8


def load_at_debug_size(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a run's configuration as `load_config` does, on tiny models and a few images (from `assets.prepare`).

    A run that starts from another's checkpoint starts from what that run left at debug size.

    Args:
        overrides: applied to the run, and again to what it is at debug size.
    """
    return override(RunConfig, _run_values(load_config(path, overrides)), overrides, f"{path} at debug size")


def _run_values(config: RunConfig) -> dict[str, Any]:
    values = config.model_dump(mode="json")
    values["output"] = str(FOLDER / config.output_path.name)
    if config.model.checkpoint is not None:
        values["model"]["checkpoint"] = str(FOLDER / Path(config.model.checkpoint).name)
    else:
        clip = str(ASSETS / "clip")
        values["model"] |= {"vision_tower": clip, "language_model": str(ASSETS / "llama")}
        if len(config.model.vision_towers) > 1:  # their sizes are those at which their grids meet
            values["model"] |= {"vision_tower": [clip, clip], "image_size": None}
        values["model"]["projector_options"] |= _small_options(config.model.projector)
    captions = config.stage == "align"
    values["data"] |= {
        "path": str(ASSETS / ("captions.json" if captions else "conversations.json")),
        "sources": [],
        "image_root": None,
        "workers": 0,
    }
    values["lora"]["rank"] = min(config.lora.rank, _RANK)
    return values | {"epochs": 1, "max_steps": None, "batch_size": 8, "micro_batch_size": 4}


def comparison_at_debug_size(config: ComparisonConfig, path: str | Path) -> ComparisonConfig:
    """The same comparison on one tiny encoder, a few images and questions about them."""
    return validate(ComparisonConfig, _comparison_values(config), f"{path} at debug size")


def _comparison_values(config: ComparisonConfig) -> dict[str, Any]:
    values = config.model_dump(mode="json")
    for stage, data in (("align", "captions"), ("finetune", "conversations")):
        if values[stage] is not None:
            settings = {**values[stage].get("data", {}), "path": str(ASSETS / f"{data}.json"), "workers": 0}
            settings = {key: value for key, value in settings.items() if key not in ("sources", "image_root")}
            values[stage] |= {"data": settings, "batch_size": 8, "micro_batch_size": 4, "epochs": 1, "max_steps": None}
    questions = {"name": "multiple_choice", "data": str(ASSETS / QUESTIONS), "answer": "likelihood"}
    return values | {
        "output": str(FOLDER / config.output_path.name),
        "title": f"{config.title or config.output_path.name} at debug size",
        "note": "Tiny models with random weights on images of one colour: it runs; the numbers mean nothing.",
        "language_model": str(ASSETS / "llama"),
        "encoders": [{"name": "tiny CLIP", "vision_tower": str(ASSETS / "clip")}],
        "projectors": [_small_projector(projector) for projector in config.projectors],
        "benchmarks": [questions],
        "held_out": str(ASSETS / "captions.json"),
        "examples": min(config.examples, 4),
    }


def _small_projector(entry: str | dict[str, Any]) -> dict[str, Any]:
    values = {"type": entry, "name": entry} if isinstance(entry, str) else entry
    return {**values, **_small_options(str(values.get("type")))}


def _small_options(projector: str) -> dict[str, int]:
    return {"hidden_size": _WIDTH} if hasattr(make_options(projector), "hidden_size") else {}
