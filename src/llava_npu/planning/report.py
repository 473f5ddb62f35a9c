"""A plan in the terminal."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from llava_npu.files.console import SafeConsole
from llava_npu.planning.options import Option
from llava_npu.planning.plan import RunPlan
from llava_npu.planning.tracing import KINDS

GIB = 2**30


def render_plan(plan: RunPlan) -> Group:
    """The plan as tables and sentences for rich's console."""
    return Group(*_parts(plan))


def print_plan(plan: RunPlan) -> None:
    """Prints the plan, 160 columns wide where the output is not a terminal."""
    SafeConsole(width=None if SafeConsole().is_terminal else 160).print(render_plan(plan))


def _parts(plan: RunPlan) -> Iterator[RenderableType]:
    target, samples = plan.target, plan.samples
    yield Text.assemble(
        (f"{plan.stage}", "bold"),
        f": {plan.trained / 1e6:,.1f} M of {plan.parameters / 1e6:,.1f} M parameters are trained, on {target.count} × "
        f"{target.name} ({amount(target.memory)} each, {amount(target.usable_memory)} to plan with)",
    )
    yield Text(
        f"samples of {samples.mean_length:,.0f} tokens and {samples.images:.2g} "
        f"{'tiles' if samples.tiles else 'images'} on average, at most "
        f"{samples.longest:,} tokens; {samples.supervised:,.0f} supervised"
    )
    yield _memory(plan)
    yield Text.assemble(*_work(plan))
    yield _recommendation(plan)
    for remark in plan.remarks:
        yield Text(remark, style="dim")


def _memory(plan: RunPlan) -> Table:
    unit, name = (GIB, "GiB") if plan.configured.at_configured.device.total >= GIB // 2 else (2**20, "MiB")
    table = Table(
        title=f"{name} per device at the peak, {plan.size_key} {plan.size}{_of_longest(plan)}",
        title_justify="left",
        title_style="",
    )
    table.add_column("engine")
    table.add_column("recompute")
    for column in (*KINDS, "total", "largest that fits", "host of a node"):
        table.add_column(column, justify="right")
    for option, host in zip(plan.options, plan.hosts, strict=True):
        peak = option.at_configured
        fits = peak.device.total <= plan.target.usable_memory
        table.add_row(
            option.engine.label,
            _recompute(plan, option),
            *(f"{getattr(peak.device, kind) / unit:,.1f}" for kind in KINDS),
            Text(f"{peak.device.total / unit:,.1f}", style="green" if fits else "red"),
            f"{option.largest:,}" if option.largest else "none",
            f"{host.total / unit:,.1f}",
            style="bold" if option is plan.configured else "",
        )
    return table


def _of_longest(plan: RunPlan) -> str:
    return "" if plan.size_key == "pack_tokens" else ", a sample of the longest length among them"


def _work(plan: RunPlan) -> Iterator[str]:
    work, target = plan.work, plan.target
    sample = work.sample
    yield (
        f"work: {_flop(sample.total)} a sample ({_flop(sample.forward)} forward, "
        f"{_flop(sample.data_gradient)} for data "
        f"gradients, {_flop(sample.weight_gradient)} for weight gradients)"
    )
    if work.total is not None:
        yield f"; {work.steps:,} steps, {_flop(work.total)} in all"
    if work.hours is not None and target.peak_flops is not None:
        yield f"\ntime: {_hours(work.hours)} at {work.mfu:.0%} MFU of {target.peak_flops / 1e12:,.1f} TFLOP/s"
        yield f" per device ({target.peak_source})"
    elif target.peak_flops is None:
        numbers = str(target.compute_dtype or torch.float32).removeprefix("torch.")
        yield f"\ntime: no peak is published for {target.name} in {numbers}"
    else:
        yield "\ntime: the number of samples is unknown"
    if (least := work.roofline) is not None:
        shares = ", ".join(f"{name} {each / least.total:.0%}" for name, each in vars(least).items())
        if target.host_speeds is None:
            yield f"\nroofline: a step takes at least {least.total:.3g} s ({shares}), MFU {work.best_mfu:.0%} at most"
        else:
            yield f"\nestimate: a step takes about {least.total:.3g} s ({shares}), MFU {work.best_mfu:.0%}"
        yield "" if work.best_hours is None else f"; {_hours(work.best_hours)} in all"
    if work.parts > 1:
        yield f"\nsequence parallel: {work.parts} devices work on each sequence; each sends {amount(work.exchanged)} "
        yield f"per step, in {work.exchanges} all-to-alls per micro-batch"
    if work.padding > 0.01:
        yield f"\npadding: {work.padding:.0%} of a micro-batch's tokens, on average"


def _recommendation(plan: RunPlan) -> Text:
    choice = plan.recommended
    if choice is None:
        least = min(plan.options, key=lambda option: option.at_configured.device.total)
        return Text(
            f"nothing fits: {_name(least)} takes the least, {amount(least.at_configured.device.total)} of "
            f"{amount(plan.target.usable_memory)}. Use more devices, shorter samples (data.max_length), or a smaller "
            "model.",
            style="red",
        )
    assert choice.at_largest is not None
    host = choice.at_largest.host
    return Text.assemble(
        "recommended: ",
        (
            " ".join(f"{key}={value}" for key, value in _settings(plan, choice).items()),
            "bold",
        ),
        f" ({amount(choice.at_largest.device.total)} per device",
        f", and {amount(host)} of the host's memory for each" if host else "",
        f"; recomputation adds {plan.work.recomputed * choice.recomputed / plan.layers:.0%} of work"
        if choice.recomputed
        else "",
        ")",
    )


def _settings(plan: RunPlan, choice: Option) -> dict[str, str]:
    checkpointing = "false" if not choice.recomputed else "true"
    if 0 < choice.recomputed < plan.layers:
        checkpointing = str(choice.recomputed)
    return choice.engine.settings | {plan.size_key: str(choice.largest), "gradient_checkpointing": checkpointing}


def _recompute(plan: RunPlan, option: Option) -> str:
    if option.recomputed in (0, plan.layers):
        return "all" if option.recomputed else "no"
    return f"{option.recomputed} of {plan.layers}"


def recommended_settings(plan: RunPlan) -> dict[str, str]:
    """The keys that a plan recommends to set, as written into a configuration; empty where nothing fits."""
    return {} if plan.recommended is None else _settings(plan, plan.recommended)


def _name(option: Option) -> str:
    return f"{option.engine.label} with gradient checkpointing" if option.recomputed else option.engine.label


def amount(size: int) -> str:
    """Bytes, for people."""
    if size >= GIB // 2:
        return f"{size / GIB:,.1f} GiB"
    return f"{size / 2**20:,.1f} MiB"


def _flop(count: float) -> str:
    for unit in ("", "k", "M", "G", "T", "P", "E"):
        if count < 1000:
            return f"{count:.3g} {unit}FLOP"
        count /= 1000
    return f"{count:,.3g} ZFLOP"


def _hours(hours: float) -> str:
    if hours >= 1:
        return f"{hours:.1f} h"
    return f"{hours * 60:.1f} min" if hours >= 1 / 60 else f"{hours * 3600:.1f} s"
