"""Experiment trackers by choice, through accelerate's: TensorBoard, Weights & Biases, SwanLab, MLflow.

metrics.jsonl holds everything whether or not there are trackers. So a tracker that fails in the middle of a run (a
server that is away, for one) is reported and left out from there on; the run continues.
"""

from __future__ import annotations

import importlib.util
import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from llava_npu.errors import UserError
from llava_npu.files.atomic import write_text
from llava_npu.files.json_objects import flatten, read_json

PROJECT = "llava-npu"
# What each tracker calls this run, so that a resumed one continues in the same place.
IDENTITIES = "trackers.json"


class Tracker(Protocol):
    """What is needed of accelerate's `GeneralTracker`."""

    def start(self) -> None: ...
    def store_init_configuration(self, values: dict[str, Any]) -> None: ...
    def log(self, values: dict[str, float], step: int | None = None) -> None: ...
    def finish(self) -> None: ...


@dataclass(frozen=True)
class TrackerKind:
    """A kind of tracker.

    Attributes:
        package: what it needs installed.
        open: makes one for (run folder, identity).
        identity: what a started one calls its run; None: the identity that it was given.
    """

    package: str
    open: Callable[[Path, str | None], Tracker]
    identity: Callable[[Any], str] | None = None


def _tensorboard(folder: Path, identity: str | None) -> Tracker:
    from accelerate.tracking import TensorBoardTracker

    return TensorBoardTracker("tensorboard", logging_dir=folder)


def _wandb(folder: Path, identity: str | None) -> Tracker:
    from accelerate.tracking import WandBTracker

    return WandBTracker(PROJECT, name=folder.name, dir=str(folder), id=identity, resume="allow")


def _swanlab(folder: Path, identity: str | None) -> Tracker:
    from accelerate.tracking import SwanLabTracker

    return SwanLabTracker(PROJECT, experiment_name=folder.name, logdir=str(folder / "swanlog"))


def _mlflow(folder: Path, identity: str | None) -> Tracker:
    from accelerate.tracking import MLflowTracker

    return MLflowTracker(PROJECT, run_id=identity, run_name=folder.name)


TRACKERS = {
    "tensorboard": TrackerKind("tensorboard", _tensorboard),
    "wandb": TrackerKind("wandb", _wandb),
    "swanlab": TrackerKind("swanlab", _swanlab),
    "mlflow": TrackerKind("mlflow", _mlflow, identity=lambda tracker: tracker.active_run.info.run_id),
}


class Trackers:
    """All trackers of a run; nothing where none is chosen."""

    def __init__(self, open_ones: Mapping[str, Tracker], console: Console) -> None:
        self._open = dict(open_ones)
        self._console = console

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """The numbers among `values`."""
        numbers = {
            name: value for name, value in _flat(values).items() if isinstance(value, int | float) and name != "step"
        }
        for name, tracker in list(self._open.items()):
            self._try(name, partial(tracker.log, numbers, step=step))

    def finish(self) -> None:
        for name, tracker in list(self._open.items()):
            self._try(name, tracker.finish)

    def _try(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # noqa: BLE001  each raises its own; it is reported, and metrics.jsonl has it all
            del self._open[name]
            self._console.print(f"[yellow]tracker {name} failed and is left out from here on: {error}[/]")


def check_trackers(names: Sequence[str], kinds: Mapping[str, TrackerKind] = TRACKERS) -> None:
    """Raises UserError, before anything is computed, where a tracker's package is not installed."""
    for name in names:
        package = kinds[name].package
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"trackers: {name} needs the package {package}, which is not installed; `pip install {package}`, or "
                "take it out of the list (metrics.jsonl and the plots are written anyway)."
            )


def open_trackers(
    names: Sequence[str],
    folder: Path,
    configuration: Mapping[str, Any],
    console: Console,
    kinds: Mapping[str, TrackerKind] = TRACKERS,
) -> Trackers:
    """Starts the chosen trackers, or resumes those of an interrupted run.

    Raises:
        UserError: one cannot be started (no network, no login, …).
    """
    known = _identities(folder)
    started: dict[str, Tracker] = {}
    for name in dict.fromkeys(names):
        kind = kinds[name]
        identity = known.get(name) or (None if kind.identity else uuid.uuid4().hex)
        tracker = kind.open(folder, identity)
        try:
            tracker.start()
            if name not in known:
                tracker.store_init_configuration(_flat(configuration))
        except Exception as error:  # each raises its own
            raise UserError(f"trackers: {name} cannot be started: {error}") from error
        started[name] = tracker
        known[name] = kind.identity(tracker) if kind.identity else str(identity)
    if started:
        write_text(folder / IDENTITIES, json.dumps(known))
    return Trackers(started, console)


def _identities(folder: Path) -> dict[str, str]:
    path = folder / IDENTITIES
    return read_json(path, advice="Delete it: the trackers then start new runs") if path.is_file() else {}


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys; anything but numbers and strings, as strings."""
    plain = (bool, int, float, str)
    return {key: value if isinstance(value, plain) else str(value) for key, value in flatten(values).items()}
