"""The run folder: one run's configuration, checkpoints, metrics and final model; opened anew or to go on.

run.yaml              the resolved configuration and the data's fingerprint
metrics.jsonl         one line per logged step
bad_samples.jsonl     one line per sample that was replaced, if any
loss.png, loss.html   loss, learning rate and throughput, drawn as the run goes
trackers.json         what experiment trackers call this run, if any are chosen
checkpoint-000500/    see `checkpoints`
model/                the final model, in Hugging Face layout, once the run is finished
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import yaml

from llava_npu.config import RunConfig
from llava_npu.errors import UserError
from llava_npu.models.loading import MODEL_FOLDER
from llava_npu.training.bad_samples import BAD_SAMPLES
from llava_npu.training.metrics import METRICS
from llava_npu.training.plots import PAGE, PICTURE
from llava_npu.training.trackers import IDENTITIES

RUN_FILE = "run.yaml"
# These change where and how fast a run goes, not what it computes.
_FREE = ("output", "device", "data.workers", "trackers", "log_every", "save_every", "keep_checkpoints")


def open_run(config: RunConfig, data_fingerprint: str, fresh: bool) -> Path:
    """Creates the run folder, or checks that it belongs to this very run, to go on with it.

    Raises:
        UserError: the folder holds something else, or a run with another configuration or other data.
    """
    folder = config.output_path
    description = {"config": config.model_dump(mode="json"), "data_fingerprint": data_fingerprint}
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output: {folder} is a file; give a folder.")
    if fresh and (folder / RUN_FILE).is_file():
        _clear(folder)
    claimed = (folder / RUN_FILE).is_file()
    if claimed and _has_begun(folder):
        _check_same(folder, description)
        return folder
    if not claimed and folder.is_dir() and any(folder.iterdir()):
        names = sorted(path.name for path in folder.iterdir())
        shown = ", ".join(names[:4]) + (" …" if len(names) > 4 else "")
        raise UserError(
            f"output: {folder} is not empty (it holds {shown}) and is not a run of this program (no {RUN_FILE}). "
            "Give a new or empty folder."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output: cannot create {folder}: {error.strerror}.") from error
    partial = folder / f".{RUN_FILE}"
    partial.write_text(yaml.safe_dump(description, sort_keys=False), encoding="utf-8")
    partial.replace(folder / RUN_FILE)
    return folder


def _has_begun(folder: Path) -> bool:
    """Whether a step was taken. A run that ended before, by a mistake in its configuration, is no run to go on with."""
    metrics = folder / METRICS
    return (
        is_finished(folder)
        or next(folder.glob("checkpoint-*"), None) is not None
        or (metrics.is_file() and metrics.stat().st_size > 0)
    )


def is_finished(folder: Path) -> bool:
    """Whether the final model is there (it appears whole, at the very end)."""
    return (folder / MODEL_FOLDER).is_dir()


def check_disk_space(folder: Path, needed: int) -> None:
    """Raises `UserError` before a run whose checkpoints and model (`needed` bytes) cannot fit on the disk."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"output: {folder} is on a disk with {free / 2**30:.1f} GiB free; this run needs {needed / 2**30:.1f} GiB "
            "for its checkpoints and the final model. Free some space, choose another `output`, or set "
            "`keep_checkpoints` lower."
        )


def _check_same(folder: Path, description: dict[str, Any]) -> None:
    before = _flatten(yaml.safe_load((folder / RUN_FILE).read_text(encoding="utf-8")))
    now = _flatten(description)
    changed = [
        f"  {key.removeprefix('config.')}: {before.get(key)!r} → {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and key.removeprefix("config.") not in _FREE
    ]
    if changed:
        raise UserError(
            f"output: {folder} holds a run that differs from this one:\n" + "\n".join(changed) + "\n"
            "Give another `output`, undo the change to continue that run, or use --fresh to delete it and start over."
        )


def _clear(folder: Path) -> None:
    # Only what runs write; run.yaml last, so that an interrupted clearing is still recognised as a run.
    for path in (*folder.glob("checkpoint-*"), *folder.glob(".*.partial"), folder / MODEL_FOLDER):
        shutil.rmtree(path, ignore_errors=True)
    for name in (METRICS, PICTURE, PAGE, IDENTITIES, BAD_SAMPLES, RUN_FILE):
        (folder / name).unlink(missing_ok=True)


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and key != "projector_options":
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
