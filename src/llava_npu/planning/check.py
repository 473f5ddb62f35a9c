"""Whether a run fits, before training starts."""

from __future__ import annotations

from dataclasses import dataclass

from llava_npu.config import RunConfig
from llava_npu.errors import UserError
from llava_npu.models.configuration import LlavaNpuConfig
from llava_npu.planning.memory import PeakMemory, configured_engine
from llava_npu.planning.options import MemoryModel
from llava_npu.planning.report import amount
from llava_npu.planning.samples import Samples, expected_samples
from llava_npu.planning.sizing import choose_sizing
from llava_npu.planning.target import Target, this_machine
from llava_npu.training.resolve import ResolvedRun
from llava_npu.training.run_folder import is_finished

# Of the usable memory, what a run may take by a generous bound without its step being traced, which takes a second.
SURELY = 0.5


@dataclass(frozen=True)
class MemoryPrediction:
    """The peak of a run as it is configured."""

    peak: PeakMemory
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
    peak = memory.peak(configured_engine(config), config.gradient_checkpointing, sizing.configured)
    return MemoryPrediction(peak, target, samples)


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
    target = this_machine(device, num_processes, 1, config.precision, for_time=False)
    if _generous_bound(config, run.model, target) <= SURELY * target.usable_memory:
        return None
    try:
        prediction = predict(run, target)
    except RuntimeError as error:  # a layer that cannot run without numbers: no reason not to train it
        return f"warning: the run's memory could not be planned ({(str(error).splitlines() or ['?'])[0]})"
    peak, usable = prediction.peak.device, target.usable_memory
    if prediction.fits:
        return f"plan: {amount(peak.total)} of {amount(usable)} per device at the peak"
    parts = ", ".join(f"{name} {amount(size)}" for name, size in vars(peak).items() if size > peak.total // 100)
    problem = (
        f"the run does not fit: at its peak each device would hold {amount(peak.total)}, and {device.name} has "
        f"{amount(usable)} to plan with ({parts}). `llava-npu plan` shows what would fit: a smaller "
        f"{'pack_tokens' if config.pack_tokens else 'micro_batch_size'}, gradient_checkpointing=true, a shorter "
        "data.max_length, or more devices."
    )
    if only_warn:
        return f"warning: {problem}"
    raise UserError(f"{problem} --ignore-plan starts it anyway.")


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
