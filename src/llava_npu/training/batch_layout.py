"""How a run's samples are laid out: padded, or packed by their token counts."""

from __future__ import annotations

from rich.console import Console
from rich.progress import Progress

from llava_npu.config import RunConfig
from llava_npu.data.dataset import ConversationDataset
from llava_npu.data.packing import PackedLayout, plan_packs
from llava_npu.data.plan import BatchLayout, PaddedLayout, Plan
from llava_npu.data.token_counts import default_workers, load_token_counts
from llava_npu.training.data import sources


def choose_layout(
    config: RunConfig,
    dataset: ConversationDataset,
    plan: Plan,
    data_fingerprint: str,
    num_processes: int,
    console: Console,
) -> BatchLayout:
    """The layout that the configuration names.

    Raises:
        UserError: the batch does not divide over the processes, or a sample does not fit into a pack.
    """
    if config.pack_tokens is None:
        return PaddedLayout(plan, num_processes, min(config.micro_batch_size, config.batch_size // num_processes))
    mixture = [(source.weight, source.limit) for source in sources(config.data)]
    held_out = config.data.validation and config.data.validation.model_dump(include={"size", "fraction"})
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("counting tokens", total=len(dataset))
        counts = load_token_counts(
            dataset,
            [data_fingerprint, mixture, held_out],
            workers=default_workers(len(dataset)),
            report=lambda count: progress.advance(task, count),
        )
    return plan_packs(plan, counts, config.pack_tokens, num_processes)


def describe_layout(layout: BatchLayout) -> str | None:
    """What packing makes of a step, in a line; None where nothing is packed."""
    if not isinstance(layout, PackedLayout):
        return None
    packs = "pack" if layout.packs_per_process == 1 else "packs"
    return (
        f"{layout.packs_per_process} {packs} of {layout.pack_length} tokens per device and step, "
        f"{layout.fill():.1%} of them used"
    )
