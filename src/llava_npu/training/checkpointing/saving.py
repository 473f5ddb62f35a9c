"""Saving a run's whole state, from all its processes into one checkpoint, and putting it back.

What is saved does not depend on the engine or on the number of processes: whole tensors by name. The main process
writes; the others hand over their parts.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn

from llava_npu.devices import Device
from llava_npu.errors import UserError
from llava_npu.training.checkpointing import state
from llava_npu.training.checkpointing.checkpoints import Checkpoint, checkpoint_path, newest, prune, write_folder
from llava_npu.training.engines import Engine
from llava_npu.training.parts import trained_parameters
from llava_npu.training.run_folder import RUN_FILE


class Saver:
    """Writes the checkpoints of a run.

    Args:
        keep: how many stay.
        in_background: copy the state to the host's memory, and write it while training continues. Never two at once: a
            checkpoint that is not written yet is waited for before the next one. What goes wrong is raised by the next
            call, whichever it is.
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
        self._accelerator = engine.accelerator
        self._device = device
        self._keep = keep
        self._in_background = in_background
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self.last_step: int | None = None

    def save(self, step: int, place: dict[str, Any]) -> None:
        """Saves the state after `step` steps; every process calls it."""
        self.finish()
        self.last_step = step
        states = gather_object([state.random_state(self._device)])
        weights: Iterable[tuple[str, torch.Tensor]] = self._engine.weights()
        moments: Iterable[tuple[str, torch.Tensor]] = self._engine.optimizer_state()
        if not self._accelerator.is_main_process:
            for _ in weights:
                pass
            for _ in moments:
                pass
            return
        if self._in_background:
            weights, moments = list(weights), list(moments)

        def fill(target: Path) -> None:
            state.write_tensors(target, state.WEIGHTS, weights)
            state.write_tensors(target, state.OPTIMIZER, moments)
            state.write_random_states(target, states)
            state.write_place(target, {"step": step, "processes": len(states), **place})
            shutil.copyfile(self._folder / RUN_FILE, target / RUN_FILE)

        def write() -> None:
            write_folder(checkpoint_path(self._folder, step), fill)
            prune(self._folder, self._keep)

        if not self._in_background:
            write()
            return

        def write_and_note() -> None:
            try:
                write()
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
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error


def newest_for_all(folder: Path, accelerator: Accelerator, report: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that verifies, which the main process finds for all."""
    found: list[Checkpoint | None] = [newest(folder, report) if accelerator.is_main_process else None]
    return broadcast_object_list(found)[0]


def load_weights(checkpoint: Path, model: nn.Module) -> state.SavedTensors:
    """Puts the trained weights into a model that is still whole; every one must be there and no other."""
    saved = state.SavedTensors(checkpoint, state.WEIGHTS)
    trained = dict(trained_parameters(model))
    if saved.keys() != trained.keys():
        different = sorted(saved.keys() ^ trained.keys())
        raise UserError(f"{checkpoint}: does not hold what this run trains: {', '.join(different[:6])} …")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(saved[name])
    return saved


def load_optimizer(checkpoint: Path, engine: Engine, weights: state.SavedTensors) -> None:
    """Puts the optimizer's state back, once the engine is prepared."""
    engine.load_optimizer_state(state.SavedTensors(checkpoint, state.OPTIMIZER), weights)


def load_random_state(checkpoint: Path, accelerator: Accelerator, device: Device) -> None:
    """Puts this process's random state back; last of all, so that nothing draws from the generators before training."""
    saved = state.read_random_state(checkpoint, accelerator.process_index)
    if saved is not None:
        state.restore_random_state(saved, device)
