"""The run folder: one run's configuration, checkpoints, metrics and final model; opened as a new run or to resume one.

run.yaml              the resolved configuration, and fingerprints of the data and of the model it starts from
metrics.jsonl         one line per logged step
bad_samples.jsonl     one line per sample that was replaced, if any
nonfinite_steps.jsonl one line per step that was skipped, if any
profile/              traces of the steps that --profile named, if any
nonfinite/            the batch that a run stopped over, for `llava-npu replay`
loss.png, loss.html   loss, learning rate and throughput, drawn as the run goes
trackers.json         what experiment trackers call this run, if any are chosen
checkpoint-000500/    see `checkpoints`
checkpoints/          links to them: `latest`, and `best` by validation loss
model/                the final model, in Hugging Face layout, once the run is finished
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml

from llava_npu.config import RunConfig
from llava_npu.config.schema import FREE_KEYS
from llava_npu.config.yaml_reader import write_yaml
from llava_npu.errors import UserError
from llava_npu.files.atomic import write_text
from llava_npu.files.json_objects import flatten
from llava_npu.files.locks import LOCK, locked
from llava_npu.files.output_folder import changes, claim_folder
from llava_npu.models.sources import MODEL_FOLDER
from llava_npu.training.bad_samples import BAD_SAMPLES
from llava_npu.training.checkpointing.checkpoints import LINKS, checkpoints
from llava_npu.training.monitoring.jsonl import NONFINITE_STEPS, REPLAYS
from llava_npu.training.monitoring.metrics import METRICS
from llava_npu.training.monitoring.plots import IMAGE, PAGE
from llava_npu.training.monitoring.profiling import PROFILES
from llava_npu.training.monitoring.trackers import IDENTITIES

RUN_FILE = "run.yaml"
RUN_ID = "run"  # drawn when a run begins, by which its checkpoints are recognised
ACCEPTED = "accepted_changes"
_LOCK_PATIENCE_SECONDS = 5.0


def open_run(
    config: RunConfig,
    data_fingerprint: str,
    model_fingerprints: Mapping[str, str] | None = None,
    *,
    fresh: bool = False,
    accept_changes: bool = False,
) -> Path:
    """Creates the run folder, or checks that it belongs to this very run, to continue it.

    Args:
        model_fingerprints: of the models that the run starts from, by their keys.
        fresh: delete what a run left there.
        accept_changes: continue although configuration, data or model changed; run.yaml then holds the new ones and the
            changes.

    Raises:
        UserError: the folder holds something else, or a run with another configuration, other data or another model.
    """
    folder = config.output_path
    description = {
        "config": config.model_dump(mode="json"),
        RUN_ID: secrets.token_hex(8),
        "model_fingerprints": dict(model_fingerprints or {}),
        "data_fingerprint": data_fingerprint,
    }
    if not fresh:
        _restore_run_file(folder)
    elif (folder / RUN_FILE).is_file():
        _clear(folder)
    if claim_folder(folder, RUN_FILE, "output", "`llava-npu train`") and _has_begun(folder):
        before = read_run_file(folder)
        changed = _changes(before, description)
        if changed and not accept_changes:
            raise UserError(
                f"output: {folder} holds a run that differs from this one:\n" + "\n".join(changed) + "\n"
                "Give another `output`, undo the change to continue that run, use --accept-changes to continue it with "
                "what is new from here on, or --fresh to delete it and start over."
            )
        if changed:
            accepted = [*before.get(ACCEPTED, []), *(line.strip() for line in changed)]
            _write(folder / RUN_FILE, {**description, RUN_ID: before.get(RUN_ID), ACCEPTED: accepted})
        return folder
    _write(folder / RUN_FILE, description)
    return folder


def read_run_file(folder: Path) -> dict[str, Any]:
    """What run.yaml holds.

    Raises:
        UserError: it is absent or damaged.
    """
    path = folder / RUN_FILE
    description = _parse(path)
    if description is None:
        raise UserError(
            f"output: {path} is absent or damaged, and no checkpoint in {folder} has a whole copy of it. Give another "
            "`output`, or start the run over with --fresh."
        )
    return description


def check_same_run(folder: Path, checkpoint: Path) -> None:
    """Raises `UserError` where a checkpoint in a run folder was written by another run, and copied there."""
    run, other = ((_parse(path / RUN_FILE) or {}).get(RUN_ID) for path in (folder, checkpoint))
    if run and other and run != other:
        raise UserError(
            f"output: {checkpoint} belongs to another run ({other}; this is {run}, see {RUN_FILE} of both). Move it "
            "out of this folder, and start the same command again."
        )


def _parse(path: Path) -> dict[str, Any] | None:
    """The description of a run in a file; None if there is none, or half of one."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    # The fingerprint comes last, or the accepted changes after it: a file that was cut short lacks it.
    whole = isinstance(values, dict) and isinstance(values.get("config"), dict) and values.get("data_fingerprint")
    return values if whole else None


def _restore_run_file(folder: Path) -> None:
    """Takes a damaged or lost run.yaml from the newest checkpoint that has a whole one."""
    if _parse(folder / RUN_FILE) is not None:
        return
    for checkpoint in checkpoints(folder):
        if (copy := _parse(checkpoint.path / RUN_FILE)) is not None:
            _write(folder / RUN_FILE, copy)
            return


def _has_begun(folder: Path) -> bool:
    """Whether a step was taken. A run that ended before, by a mistake in its configuration, cannot be resumed."""
    metrics = folder / METRICS
    return (
        is_finished(folder)
        or next(folder.glob("checkpoint-*"), None) is not None
        or (metrics.is_file() and metrics.stat().st_size > 0)
    )


@contextmanager
def only_process(folder: Path) -> Iterator[None]:
    """Holds a run folder's lock, so that no two runs write into it; the system frees it when this process ends.

    Raises:
        UserError: another process holds it, or the folder cannot be written.
    """
    busy = f"output: another process is training in {folder}. Wait for it or stop it, or give another `output`."
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(folder / LOCK, busy=busy, patience=_LOCK_PATIENCE_SECONDS))
        except OSError as error:
            raise _unwritable(folder, error) from error
        yield


def is_finished(folder: Path) -> bool:
    """Whether the final model is there (it appears whole, at the very end); a folder without weights is not one."""
    return next((folder / MODEL_FOLDER).glob("*.safetensors"), None) is not None


def _unwritable(folder: Path, error: OSError) -> UserError:
    place = error.filename or folder
    return UserError(
        f"output: {place} cannot be written or deleted: {error.strerror or error}. Make {folder} writable, or give "
        "another `output`."
    )


def check_disk_space(folder: Path, needed: int) -> None:
    """Raises `UserError` before a run whose checkpoints and model (`needed` bytes) cannot fit on the disk.

    What checkpoints of an earlier start take is counted as room.
    """
    there = (file for each in checkpoints(folder) for file in each.path.rglob("*") if file.is_file())
    free = shutil.disk_usage(folder).free + sum(file.stat().st_size for file in there)
    if free < needed:
        raise UserError(
            f"output: {folder} is on a disk with {free / 2**30:.1f} GiB free; this run needs {needed / 2**30:.1f} GiB "
            "for its checkpoints and the final model. Free some space, choose another `output`, or set "
            "`keep_checkpoints` lower."
        )


def _changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two descriptions of a run and matters, a line each."""

    def flat(run: dict[str, Any]) -> dict[str, Any]:
        described = {key: value for key, value in run.items() if key not in (ACCEPTED, RUN_ID)}
        values = flatten(described, whole=("projector_options",))
        return {key.removeprefix("config."): value for key, value in values.items()}

    old, new = flat(before), flat(now)

    def matters(key: str) -> bool:
        if key.startswith("model_fingerprints."):  # a model that is gone by now, or that no one noted, is not another
            return key in old and key in new
        return not _is_free(key)

    return sorted(changes(old, new, matters))


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in FREE_KEYS)


def _write(path: Path, description: dict[str, Any]) -> None:
    write_text(path, write_yaml(description))


def _clear(folder: Path) -> None:
    """Deletes what runs write, and nothing else.

    Raises:
        UserError: something cannot be deleted.
    """
    try:
        # run.yaml last, so that an interrupted clearing is still recognised as a run.
        folders = (
            *folder.glob("checkpoint-*"),
            *folder.glob(".*.partial"),
            folder / LINKS,
            folder / REPLAYS,
            folder / PROFILES,
        )
        for path in (*folders, folder / MODEL_FOLDER):
            if path.exists():
                shutil.rmtree(path)
        for name in (METRICS, IMAGE, PAGE, IDENTITIES, BAD_SAMPLES, NONFINITE_STEPS, RUN_FILE):
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error
