"""Saving a run's whole state, each process its part, and putting it back.

What is saved can be read by any engine and any number of processes (`checkpointing.state`). The main process makes the
folder, adds the manifest, and gives the folder its name once all have written; what goes wrong in one process is raised
in all of them.
"""

from __future__ import annotations

import math
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn
from torch.distributed.checkpoint import CheckpointException

from llava_npu.devices import Device
from llava_npu.errors import UserError
from llava_npu.files import atomic
from llava_npu.training.checkpointing import state
from llava_npu.training.checkpointing.checkpoints import (
    ADVICE,
    BEST,
    LATEST,
    Fingerprint,
    TrainingCheckpoint,
    checkpoint_path,
    checkpoints,
    fingerprint,
    link,
    linked,
    newest,
    prune,
    verify,
    write_manifest,
)
from llava_npu.training.engines import Engine
from llava_npu.training.monitoring.metrics import read_validation_loss
from llava_npu.training.parts import trained_parameters
from llava_npu.training.run_folder import RUN_FILE, check_same_run

_Result = TypeVar("_Result")


class Saver:
    """Writes the checkpoints of a run. Every process has one, and calls the same methods between the same steps.

    Args:
        keep: how many stay.
        in_background: copy the state to the host's memory (pinned, where there is an accelerator), and write it while
            training continues. Never two at once: a checkpoint that is not written yet is waited for before the next
            one. What goes wrong is raised by the next call, whichever it is.
    """

    def __init__(
        self,
        folder: Path,
        engine: Engine,
        device: Device,
        *,
        keep: int,
        in_background: bool,
    ):
        self._folder = folder
        self._engine = engine
        self._process = engine.accelerator.process_index
        self._device = device
        self._keep = keep
        self._in_background = in_background
        # Of its own: messages between the threads that write must not mix with those between steps.
        self._group = dist.new_group(backend="gloo") if engine.accelerator.num_processes > 1 else None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._validated: tuple[int, float] | None = None
        self.last_step: int | None = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, *_: object) -> None:
        """Waits for what is being written, so that a run that fails leaves it complete; the run's error counts."""
        self._wait()

    def note_validation(self, step: int, loss: float) -> None:
        """Links the checkpoint of this step as the best one, if it is; every process may call it."""
        if step == self.last_step and self._process == 0:
            self._validated = step, loss
            if self._thread is None:
                self._link_best()

    def save(self, step: int, place: Mapping[str, Any]) -> None:
        """Saves the state after `step` steps; every process calls it."""
        self.finish()
        self.last_step = step
        states = gather_object([state.random_state(self._device)])
        tensors = self._engine.state()
        description = {"step": step, "processes": len(states), **place}
        if not self._in_background:
            self._write(description, states, tensors)
            return
        tensors = {name: self._device.start_reading(tensor) for name, tensor in tensors.items()}
        self._device.mark().wait()

        def write_and_note() -> None:
            try:
                self._write(description, states, tensors)
            except BaseException as error:  # noqa: BLE001  raised in the main thread, by `check` or `finish`
                self._error = error

        self._thread = threading.Thread(target=write_and_note, name="checkpoint")
        self._thread.start()

    def check(self) -> None:
        """Raises what went wrong in the background, without waiting."""
        if self._thread is not None and not self._thread.is_alive():
            self.finish()

    def finish(self) -> None:
        """Waits for what is being written, and raises what went wrong."""
        self._wait()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        self._link_best()

    def _wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _link_best(self) -> None:
        if self._validated is None:
            return
        (step, loss), self._validated = self._validated, None
        best = linked(self._folder, BEST)
        lowest = None if best is None else read_validation_loss(self._folder, best.step)
        if math.isfinite(loss) and (lowest is None or loss < lowest):
            link(self._folder, BEST, TrainingCheckpoint(step, checkpoint_path(self._folder, step)))

    def _write(self, place: Mapping[str, Any], states: list[dict[str, Any]], tensors: dict[str, torch.Tensor]) -> None:
        """Writes a checkpoint; on one process or another something may fail, and then nothing stays on any."""
        path, is_main = checkpoint_path(self._folder, place["step"]), self._process == 0
        partial = atomic.partial_path(path)

        def write_own() -> dict[str, Fingerprint]:
            state.write_tensors(partial, tensors, self._group)
            own = state.own_files(partial, self._process)
            return {str(file.relative_to(partial)): fingerprint(file) for file in own}

        def complete(written: list[dict[str, Fingerprint]]) -> None:
            state.write_random_states(partial, states)
            state.write_place(partial, place)
            shutil.copyfile(self._folder / RUN_FILE, partial / RUN_FILE)
            write_manifest(partial, {name: each for files in written for name, each in files.items()})
            atomic.finish_folder(path)
            link(self._folder, LATEST, TrainingCheckpoint(place["step"], path))
            prune(self._folder, self._keep, spare=linked(self._folder, BEST))

        try:
            self._together(path, lambda: atomic.start_folder(path) if is_main else None)
            written = self._together(path, write_own)
            self._together(path, lambda: complete(written) if is_main else None)
        except BaseException:
            if is_main:
                shutil.rmtree(partial, ignore_errors=True)
            raise

    def _together(self, path: Path, work: Callable[[], _Result]) -> list[_Result]:
        """What `work` gave in each process, once it is through in all; raises everywhere what was raised anywhere."""
        result: _Result | None = None
        mine: Exception | None = None
        try:
            with atomic.explaining(path, ADVICE):
                try:
                    result = work()
                except CheckpointException as error:
                    raise state.cause(error) from None
        except Exception as error:  # noqa: BLE001  raised below
            mine = error
        outcomes = [(result, mine and (type(mine) is UserError, str(mine)))]
        if self._group is not None:
            outcomes *= self._group.size()
            dist.all_gather_object(outcomes, outcomes[0], group=self._group)
        if mine is not None:
            raise mine
        for _, problem in outcomes:
            if problem:
                by_user, text = problem
                raise UserError(text) if by_user else RuntimeError(text)
        return [each for each, _ in outcomes]  # type: ignore[misc]


def newest_for_all(folder: Path, accelerator: Accelerator, report: Callable[[str], None]) -> TrainingCheckpoint | None:
    """The newest checkpoint that verifies; each process looks at a share of its files, and all find the same."""

    def problem(path: Path) -> str | None:
        share = accelerator.process_index, accelerator.num_processes
        return next((each for each in gather_object([verify(path, share)]) if each is not None), None)

    # As the main process sees the folder: over a network others may see it later.
    here = broadcast_object_list([checkpoints(folder) if accelerator.is_main_process else None])[0]
    found = newest(here, report, problem)
    if found is not None:
        check_same_run(folder, found.path)
    return found


def load_weights(checkpoint: Path, model: nn.Module) -> None:
    """Puts the trained weights, in float32, into a model that is whole and in no engine."""
    saved, trained = state.SavedState(checkpoint), dict(trained_parameters(model))
    saved.check({name: parameter.shape for name, parameter in trained.items()})
    # Not into the model's own memory, which may be a file's and of fewer bits.
    tensors = {name: torch.empty(parameter.shape) for name, parameter in trained.items()}
    saved.read({state.weight_key(name): tensor for name, tensor in tensors.items()})
    for name, parameter in trained.items():
        parameter.data = tensors[name]


def load_state(checkpoint: Path, engine: Engine) -> None:
    """Puts weights and optimizer back, once the engine is prepared; every process calls it.

    Raises:
        UserError: the checkpoint is of another form, or does not hold what the run trains.
    """
    saved = state.SavedState(checkpoint)
    saved.check(engine.trained_shapes())
    engine.load_state(saved)


def load_random_state(checkpoint: Path, accelerator: Accelerator, device: Device) -> None:
    """Puts this process's random state back; last of all, so that nothing draws from the generators before training."""
    saved = state.read_random_state(checkpoint, accelerator.process_index)
    if saved is not None:
        state.restore_random_state(saved, device)
