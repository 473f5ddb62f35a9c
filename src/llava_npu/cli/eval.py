"""`llava-npu eval`: puts a benchmark's questions to a model and scores the answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llava_npu.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from llava_npu.evaluation.questions import Answerer
    from llava_npu.evaluation.report import Report


def eval_(
    benchmark: Annotated[str | None, typer.Argument(help="Its name; see --list.")] = None,
    model: Annotated[str | None, typer.Option(help="Model folder, run folder or hub id.")] = None,
    data: Annotated[Path | None, typer.Option(help="The benchmark's file.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for predictions and report; an interrupted run goes on.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered at once.")] = 8,
    answer: Annotated[
        str,
        typer.Option(help="generate, or choose the likeliest option: likelihood (its text), likelihood-letter."),
    ] = "generate",
    images: Annotated[str, typer.Option(help="given; baselines: none (blind), shuffled (a wrong image).")] = "given",
    device: Annotated[str, typer.Option(help="auto, npu, cuda or cpu; with an index as in npu:1.")] = "auto",
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest generated answer. By default as the benchmark says.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Throw away what OUTPUT holds of an earlier run.")] = False,
    list_: Annotated[bool, typer.Option("--list", help="List the benchmarks and leave.")] = False,
) -> None:
    """Evaluate a model on a benchmark: predictions, scores with intervals, baselines."""
    from rich.console import Console

    console = Console()
    if list_:
        _print_benchmarks(console)
        return
    for name, value in {"BENCHMARK": benchmark, "--model": model, "--data": data, "--output": output}.items():
        if value is None:
            raise UserError(f"{name} is missing. Try: llava-npu eval mmbench --model DIR --data FILE.tsv --output DIR")
    assert benchmark is not None
    assert model is not None
    assert data is not None
    assert output is not None

    from llava_npu.evaluation.ablations import IMAGE_MODES
    from llava_npu.evaluation.answering import ANSWER_MODES
    from llava_npu.evaluation.benchmarks import get
    from llava_npu.evaluation.report import as_terminal

    chosen = get(benchmark)
    _check_choice("--answer", answer, ANSWER_MODES)
    _check_choice("--images", images, IMAGE_MODES)
    chosen.read(data)  # bad data is reported before a model is loaded
    answerer = _load(model, device, answer, max_new_tokens or chosen.max_new_tokens)
    report = _evaluate(console, benchmark, data, answerer, output, images, batch_size, fresh)
    console.print(as_terminal(report))
    console.print(f"Predictions and report: {output}")


def _load(model: str, device_name: str, answer: str, max_new_tokens: int) -> Answerer:
    import torch

    from llava_npu import devices
    from llava_npu.evaluation.answering import build_answerer
    from llava_npu.models import load

    device = devices.select(device_name)
    # 16 bits where the device computes in them, else fp32: on most CPUs 16-bit products are far slower.
    loaded, processor = load(model, device=device.torch_device, dtype=device.autocast_dtype or torch.float32)
    return build_answerer(answer, loaded, processor, max_new_tokens=max_new_tokens, device=device.name)


def _evaluate(
    console: Console,
    benchmark: str,
    data: Path,
    answerer: Answerer,
    output: Path,
    images: str,
    batch_size: int,
    fresh: bool,
) -> Report:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from llava_npu.evaluation import runner

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(benchmark)

        def show(progress: runner.Progress) -> None:
            unread = f", {progress.errors} unreadable" if progress.errors else ""
            bar.update(task, completed=progress.done, total=progress.total, description=f"{benchmark}{unread}")

        return runner.evaluate(
            benchmark,
            data,
            answerer,
            output,
            images=images,
            batch_size=batch_size,
            fresh=fresh,
            on_progress=show,
        )


def _check_choice(option: str, value: str, allowed: tuple[str, ...]) -> None:
    from llava_npu.errors import nearest

    if value not in allowed:
        raise UserError(f"{option} {value!r} is unknown.{nearest(value, allowed)} Allowed: {', '.join(allowed)}.")


def _print_benchmarks(console: Console) -> None:
    from rich.markup import escape
    from rich.table import Table

    from llava_npu.evaluation.benchmarks import available

    table = Table("name", "benchmark", "data", "metric")
    for benchmark in available().values():
        table.add_row(*map(escape, (benchmark.name, benchmark.title, benchmark.data, benchmark.metric)))
    console.print(table)
