"""Whether a run fits, before training starts."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace

from llava_npu.config import RunConfig
from llava_npu.distributed import launched
from llava_npu.errors import UserError
from llava_npu.models.configuration import LlavaNpuConfig
from llava_npu.planning.host import (
    PROCESS,
    WORKER,
    HostMemory,
    available_memory,
    host_memory,
    shared_memory_needed,
)
from llava_npu.planning.memory import PeakMemory, configured_engine
from llava_npu.planning.options import MemoryModel
from llava_npu.planning.report import amount
from llava_npu.planning.samples import Samples, expected_samples
from llava_npu.planning.sizing import choose_sizing
from llava_npu.planning.target import GIB, Target, this_machine
from llava_npu.planning.tracing import Held
from llava_npu.training.batches import SHARED_MEMORY
from llava_npu.training.resolve import ResolvedRun
from llava_npu.training.run_folder import is_finished

# Of the usable memory, what a run may take by a generous bound without its step being traced, which takes a second.
SURELY = 0.5


@dataclass(frozen=True)
class MemoryPrediction:
    """The peak of a run as it is configured, and the memory of a node."""

    peak: PeakMemory
    host: HostMemory
    target: Target
    samples: Samples

    @property
    def fits(self) -> bool:
        return self.peak.device.total <= self.target.usable_memory


def predict(run: ResolvedRun, target: Target) -> MemoryPrediction:
    """The peak of one device, of the engine and sizes that the run configures.

    Raises:
        UserError: a model's configuration cannot be had, or the batch does not divide over the devices.
    """
    config, samples = run.config, expected_samples(run)
    sizing = choose_sizing(config, samples, target.count)
    memory = MemoryModel(config, run.model, sizing, target)
    engine = configured_engine(config)
    peak = memory.peak(engine, memory.configured_recomputed(engine), sizing.configured)
    host = host_memory(run, memory.prepared, engine, peak, target)
    return MemoryPrediction(peak, host, target, samples)


def choose_recomputation(run: ResolvedRun, num_processes: int, *, fresh: bool = False) -> ResolvedRun:
    """The run with `gradient_checkpointing: auto` replaced by the fewest layers with which it fits; others as they are.

    The choice follows from the configuration and the devices' memory as a whole, so that all processes make the same.

    Args:
        fresh: as for `refuse_what_cannot_fit`.

    Raises:
        UserError: a model's configuration cannot be had, or the batch does not divide over the devices.
    """
    config = run.config
    if config.gradient_checkpointing != "auto":
        return run
    if is_finished(config.output_path) and not fresh:
        return _with_recomputation(run, False)
    local = min(launched.local_world_size(), num_processes)
    target = this_machine(run.device, local, num_processes // local, config.precision, for_time=False)
    if target.kind == "cpu":  # what is free changes while processes start
        target = replace(target, memory=run.device.memory().total // local)
    if _generous_bound(config, run.model, target) <= SURELY * target.usable_memory:
        return _with_recomputation(run, False)
    sizing = choose_sizing(config, expected_samples(run), target.count)
    memory = MemoryModel(config, run.model, sizing, target)
    count = memory.configured_recomputed(configured_engine(config))
    return _with_recomputation(run, True if count == memory.layers else count or False)


def _with_recomputation(run: ResolvedRun, chosen: bool | int) -> ResolvedRun:
    return replace(run, config=run.config.model_copy(update={"gradient_checkpointing": chosen}))


def refuse_what_cannot_fit(
    run: ResolvedRun, num_processes: int, *, fresh: bool = False, only_warn: bool = False
) -> str | None:
    """Predicts a run's peak on the devices that it is about to use.

    Args:
        fresh: a finished run starts over; otherwise nothing is left of it that needs to fit.
        only_warn: return what would be raised.

    Returns:
        The prediction in a line; None where a run so small that it surely fits was not looked at closely, or the run
        is finished.

    Raises:
        UserError: it cannot fit; the message says what would.
    """
    config, device = run.config, run.device
    if is_finished(config.output_path) and not fresh:
        return None
    local = min(launched.local_world_size(), num_processes)
    target = this_machine(device, local, num_processes // local, config.precision, for_time=False)
    problem = _shared_memory_problem(config, run.model, local) or _libraries_problem(config, local)
    if problem:
        return _refuse(problem, only_warn)
    if _generous_bound(config, run.model, target) <= SURELY * target.usable_memory:
        return None
    try:
        prediction = predict(run, target)
    except RuntimeError as error:  # a layer that cannot run without numbers: no reason not to train it
        return f"warning: the run's memory could not be planned ({(str(error).splitlines() or ['?'])[0]})"
    peak, usable = prediction.peak.device, target.usable_memory
    host, left = prediction.host, available_memory()
    if not prediction.fits:
        problem = _device_problem(config, peak, device.name, usable)
    elif host.total > left:
        problem = _host_problem(config, host, local, left)
    else:
        return (
            f"plan: {amount(peak.total)} of {amount(usable)} per device at the peak, {amount(host.total)} of "
            f"{amount(left)} of this machine's memory"
        )
    return _refuse(problem, only_warn)


def _refuse(problem: str, only_warn: bool) -> str:
    if only_warn:
        return f"warning: {problem}"
    raise UserError(f"{problem} --ignore-plan starts it anyway.")


def _device_problem(config: RunConfig, peak: Held, name: str, usable: int) -> str:
    parts = ", ".join(f"{name} {amount(size)}" for name, size in vars(peak).items() if size > peak.total // 100)
    return (
        f"the run does not fit: at its peak each device would hold {amount(peak.total)}, and {name} has "
        f"{amount(usable)} to plan with ({parts}). `llava-npu plan` shows what would fit: a smaller "
        f"{'pack_tokens' if config.pack_tokens else 'micro_batch_size'}, gradient_checkpointing=true, a shorter "
        "data.max_length, or more devices."
    )


def _host_problem(config: RunConfig, host: HostMemory, processes: int, left: int) -> str:
    return (
        f"the run does not fit into this machine's memory: it takes {amount(host.total)} ({amount(host.mapped)} of "
        f"weights as stored, once for all processes; {amount(host.processes)} for {processes} processes with "
        f"{config.data.workers} data workers each; {amount(host.engine)} that engine={config.engine} keeps there), and "
        f"{amount(left)} are available. Use fewer data.workers, no offload (engine_options), or fewer devices."
    )


def _libraries_problem(config: RunConfig, processes: int) -> str:
    """What is wrong where not even processes without a model fit; "" if nothing."""
    needed, left = processes * (PROCESS + config.data.workers * WORKER), available_memory()
    if needed <= left:
        return ""
    return (
        f"{processes} processes with {config.data.workers} data workers each take about {amount(needed)} of this "
        f"machine's memory before there is a model, and {amount(left)} are available. Use fewer data.workers, or fewer "
        "devices."
    )


def _shared_memory_problem(config: RunConfig, model: LlavaNpuConfig, processes: int) -> str:
    """What is wrong where workers would die of a full /dev/shm, with a bus error; "" if nothing."""
    if not config.data.workers or not SHARED_MEMORY.is_dir():
        return ""
    needed, left = shared_memory_needed(config, model, processes), shutil.disk_usage(SHARED_MEMORY).free
    if needed <= left:
        return ""
    return (
        f"data.workers: {processes} × {config.data.workers} workers hand images over in shared memory, up to "
        f"{amount(needed)} at once, and {SHARED_MEMORY} has {amount(left)} left. Start the container with a larger one "
        f"(docker run --shm-size={-(-needed // GIB) + 1}g …, or --ipc=host), or set data.workers=0."
    )


def _generous_bound(config: RunConfig, model: LlavaNpuConfig, target: Target) -> int:
    """More bytes than a run of this shape takes: everything trained, nothing shared, every layer's values several times
    over.
    """
    text, tower = model.text_config, model.tower
    tokens = config.pack_tokens or config.data.max_length * min(config.micro_batch_size, config.batch_size)
    width = max(text.hidden_size, text.intermediate_size)
    weights = 4 * text.hidden_size * (text.num_hidden_layers * (width + text.hidden_size) + 2 * text.vocab_size)
    images = -(-tokens // model.num_image_tokens)
    of_images = images * tower.num_layers * tower.num_patches * 16 * tower.hidden_size
    return 20 * weights + 4 * (tokens * (24 * text.num_hidden_layers * width + 4 * text.vocab_size) + of_images)
