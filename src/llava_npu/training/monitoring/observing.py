"""What a run learns of its steps: copied to the host while the device continues, read when it has arrived.

Nothing waits for the device in a step. Its numbers are copied into pinned memory behind it in the device's queue, and
are looked at, in order, before the first later step that finds them there; as a rule that is the next one.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from llava_npu.devices import Device
from llava_npu.devices.marks import Mark
from llava_npu.errors import UserError
from llava_npu.training.monitoring.metrics import StepMetrics
from llava_npu.training.monitoring.throughput import Throughput
from llava_npu.training.nonfinite.guard import NonFiniteGuard


@dataclass(frozen=True)
class _Observation:
    """Numbers on their way.

    Attributes:
        values: a norm for each of `steps`, and behind them the last one's loss, where it is reported; right once the
            mark is reached.
        steps: those that were made since the observation before.
        known: what else is reported of the last of them; None: nothing is.
        speed: of them, where it is reported.
    """

    values: torch.Tensor
    mark: Mark
    steps: tuple[int, ...]
    known: Mapping[str, Any] | None
    speed: Callable[[], Throughput] | None


class Observer:
    """Looks at a run's steps. Every process has one, and calls the same methods between the same steps.

    Args:
        report: where metrics go; None in processes that report nothing.
    """

    def __init__(self, device: Device, guard: NonFiniteGuard, report: Callable[[StepMetrics], None] | None) -> None:
        self._device = device
        self._guard = guard
        self._report = report
        self._pending: deque[_Observation] = deque()

    def observe(self, loss: torch.Tensor, known: Mapping[str, Any], speed: Callable[[], Throughput]) -> None:
        """Sends the loss of the step that was just made on its way, to be reported, and the norms of all before.

        Args:
            loss: of the whole step.
            known: what the host knows of the step already, as `StepMetrics` has it.
            speed: as `ThroughputMeter.report` gives it.
        """
        self._send([loss], known, speed)

    def _send(
        self,
        losses: list[torch.Tensor],
        known: Mapping[str, Any] | None = None,
        speed: Callable[[], Throughput] | None = None,
    ) -> None:
        norms = self._guard.take()
        # Where gradients are kept on the host, their norm is there: it goes round by the device, to come with the rest.
        numbers = [number.to(self._device.torch_device) for number in (*norms.values(), *losses)]
        if numbers:
            values = self._device.start_reading(torch.stack(numbers))
            self._pending.append(_Observation(values, self._device.mark(), tuple(norms), known, speed))

    def ready(self) -> bool:
        """Whether there is something to look at, in this process."""
        return bool(self._pending) and self._pending[0].mark.reached()

    def poll(self) -> None:
        """Looks at the oldest numbers, which have arrived in every process.

        Raises:
            UserError: more steps were skipped than may be.
        """
        seen = self._pending.popleft()
        values = seen.values.tolist()
        try:
            self._guard.look(dict(zip(seen.steps, values, strict=False)))  # without the loss
        except UserError:  # saved after all steps that were made: their metrics must not end before
            self._show(seen)
            while self._pending:
                later = self._pending.popleft()
                later.mark.wait()
                self._show(later)
            raise
        self._show(seen)

    def _show(self, seen: _Observation) -> None:
        if self._report is None or seen.known is None or seen.speed is None:
            return
        norm, loss = seen.values.tolist()[-2:]
        metrics = StepMetrics(
            loss=_finite(loss),
            grad_norm=_finite(norm),
            skipped_steps=self._guard.skipped,
            **seen.known,
            **asdict(seen.speed()),
        )
        self._report(metrics)

    def finish(self) -> None:
        """Looks at every step that was made, and waits for what is not there yet."""
        self._send([])
        while self._pending:
            self._pending[0].mark.wait()
            self.poll()


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
