"""Steps whose gradient is not finite: skipped on the device, named once the host looks, and not too many of them.

The engine skips such a step without the host (`Engine.step`), so nothing is waited for while all is well. The host
looks when norms have come there (`observing.py`), and before it saves. Then each skipped step is computed once more to
find where numbers stopped being finite, and noted in nonfinite_steps.jsonl. Above the limit the run stops, with a
checkpoint and the step's batch saved for `llava-npu replay`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from rich.console import Console
from rich.text import Text
from safetensors import safe_open
from safetensors.torch import save_file

from llava_npu.errors import UserError
from llava_npu.training.batches import MicroBatch
from llava_npu.training.checkpointing.state import random_state, restore_random_state
from llava_npu.training.engines import Engine
from llava_npu.training.monitoring.jsonl import NONFINITE_STEPS, REPLAYS, append_lines, read_lines
from llava_npu.training.nonfinite.search import NonFinite, find_nonfinite
from llava_npu.training.resolve import ResolvedRun

_SHOWN = 8


class NonFiniteGuard:
    """Watches the gradient norms of a run.

    Args:
        batches_of: gives this process's micro-batches of a step; with True, those that it saves for `llava-npu replay`,
            which are of whole rows.
        save: writes a checkpoint after that many steps.

    Attributes:
        skipped: how many steps were, from the run's beginning.
    """

    def __init__(
        self,
        run: ResolvedRun,
        engine: Engine,
        console: Console,
        *,
        batches_of: Callable[[int, bool], Sequence[MicroBatch]],
        save: Callable[[int], None],
    ) -> None:
        self._folder = run.config.output_path
        self._engine = engine
        self._device = run.device
        self._limit = run.config.max_nonfinite_steps
        self._batches_of = batches_of
        self._save = save
        self._console = console
        self._norms: dict[int, torch.Tensor] = {}
        self._made = 0
        main = engine.accelerator.is_main_process
        self.skipped: int = broadcast_object_list([len(read_lines(self._folder / NONFINITE_STEPS)) if main else 0])[0]

    def add(self, step: int, norm: torch.Tensor) -> None:
        """A step that was made, and the norm of its gradient, still on the device."""
        self._norms[step] = norm
        self._made = step

    def take(self) -> dict[int, torch.Tensor]:
        """The norms of the steps since it was last called, for whoever brings them to the host."""
        taken, self._norms = self._norms, {}
        return taken

    def look(self, norms: Mapping[int, float]) -> None:
        """Looks at norms that are on the host; every process calls it, between the same steps.

        Raises:
            UserError: more steps were skipped than may be.
        """
        for step, norm in norms.items():
            if not math.isfinite(norm):
                self._handle(step, self._made)

    def _handle(self, step: int, now: int) -> None:
        engine = self._engine
        generators = random_state(self._device)
        micro_batches = self._batches_of(step, False)  # loaded again: keeping them would take memory while all is well
        finding = self._find(micro_batches)
        restore_random_state(generators, self._device)
        findings = [each for each in gather_object([finding]) if each is not None]
        names = list(dict.fromkeys(gather_object([name for each in micro_batches for name in each.names])))
        if not findings and engine.scaler.is_enabled():  # computed once more without the scale, it is finite
            self._console.print(f"step {step}: skipped, its scaled gradient left float16's range; the scale was halved")
            return
        self.skipped += 1
        if engine.accelerator.is_main_process:
            note_step(self._folder, step, findings, names, self._console)
        if self.skipped > self._limit:
            self._stop(step, now)

    def _find(self, micro_batches: Sequence[MicroBatch]) -> NonFinite | None:
        engine = self._engine
        supervised = max(sum(micro_batch.supervised_tokens for micro_batch in micro_batches), 1)
        finding = find_nonfinite(engine, engine.model, micro_batches, supervised, engine.accelerator.device)
        engine.forget_gradients()
        return finding

    def _stop(self, step: int, now: int) -> None:
        accelerator = self._engine.accelerator
        self._save(now)
        if micro_batches := self._batches_of(step, True):
            save_batch(self._folder, step, accelerator.process_index, micro_batches)
        accelerator.wait_for_everyone()
        raise UserError(
            f"{self.skipped} steps had a gradient that is not finite, more than max_nonfinite_steps ({self._limit}); "
            f"{self._folder / NONFINITE_STEPS} names each with its module and samples. All is saved after step {now}, "
            f"and the last such batch for: llava-npu replay {self._folder}\n"
            "Repair the data, lower optimizer.learning_rate or compute in fp32; to go on nevertheless, start the same "
            "command again, with a higher limit."
        )


def note_step(folder: Path, step: int, findings: Sequence[NonFinite], samples: Sequence[str], console: Console) -> None:
    """Adds a skipped step to the run's list, and says so."""
    first = findings[0] if findings else None
    line: dict[str, Any] = {"step": step}
    line |= asdict(first) if first else {"module": None, "what": None, "samples": list(samples)}
    append_lines(folder / NONFINITE_STEPS, [line])
    console.print(Text(f"step {step}: skipped, {describe(first)}", style="yellow"))


def describe(finding: NonFinite | None) -> str:
    """A sentence about where numbers stopped being finite."""
    if finding is None:
        return (
            "its gradient is not finite. Computed once more it is: look at the device and at the connections between "
            "devices (llava-npu verify)"
        )
    where = {
        "output": f"the output of {finding.module}",
        "weights": f"the weights of {finding.module}",
        "gradient": f"the gradient that comes back to {finding.module}",
        "parameters": f"the gradient of {finding.module}",
    }[finding.what]
    names = ", ".join(finding.samples[:_SHOWN]) + (" …" if len(finding.samples) > _SHOWN else "")
    return f"its gradient is not finite: first {where}, in {names}"


def save_batch(folder: Path, step: int, rank: int, micro_batches: Sequence[MicroBatch]) -> None:
    """Writes one process's micro-batches of a step."""
    target = folder / REPLAYS / f"step-{step:06d}"
    target.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    counts = []
    for number, micro_batch in enumerate(micro_batches):
        tensors |= {f"{number}/{name}": tensor.contiguous() for name, tensor in micro_batch.tensors.items()}
        values = asdict(micro_batch)
        counts.append({name: value for name, value in values.items() if name != "tensors"})
    save_file(tensors, target / f"process-{rank:05d}.safetensors", metadata={"micro_batches": json.dumps(counts)})


def load_batch(file: Path) -> list[MicroBatch]:
    """Reads what `save_batch` wrote."""
    with safe_open(file, framework="pt") as stored:
        counts = json.loads(stored.metadata()["micro_batches"])
        tensors: list[dict[str, torch.Tensor]] = [{} for _ in counts]
        for key in stored.keys():  # noqa: SIM118  it is not a mapping
            number, name = key.split("/", 1)
            tensors[int(number)][name] = stored.get_tensor(key)
    return [_micro_batch(own, each) for own, each in zip(tensors, counts, strict=True)]


def _micro_batch(tensors: dict[str, torch.Tensor], counts: dict[str, Any]) -> MicroBatch:
    values: dict[str, Any] = {name: tuple(each) if isinstance(each, list) else each for name, each in counts.items()}
    return MicroBatch(tensors=tensors, **values)
