"""`llava-npu eval`: puts a benchmark's questions to a model and scores the answers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llava_npu.cli.model_options import HUB
from llava_npu.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from llava_npu.evaluation.benchmarks import Benchmark
    from llava_npu.evaluation.judge.client import JudgeClient
    from llava_npu.evaluation.processes import Processes
    from llava_npu.evaluation.questions import Answerer
    from llava_npu.evaluation.reports.report import Report


def eval_(
    benchmark: Annotated[str | None, typer.Argument(help="Its name; several: NAME,NAME. See --list.")] = None,
    model: Annotated[str | None, typer.Option(help="Model folder, run folder or hub id.")] = None,
    data: Annotated[Path | None, typer.Option(help="The benchmark's file, or a folder of benchmarks.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for predictions and report; an interrupted run goes on.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered at once.")] = 8,
    answer: Annotated[
        str,
        typer.Option(help="generate, or choose the likeliest option: likelihood (its text), likelihood-letter."),
    ] = "generate",
    images: Annotated[str, typer.Option(help="given; baselines: none (blind), shuffled (a wrong image).")] = "given",
    source: Annotated[str, HUB] = "huggingface",
    device: Annotated[str, typer.Option(help="auto, npu, cuda or cpu; with an index as in npu:1.")] = "auto",
    devices: Annotated[
        int, typer.Option(min=1, help="How many devices of this machine share the work, each in a process of its own.")
    ] = 1,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest generated answer. By default as the benchmark says.")
    ] = None,
    judge_url: Annotated[
        str | None, typer.Option(help="A judge's OpenAI-compatible endpoint; its key: LLAVA_NPU_JUDGE_KEY.")
    ] = None,
    judge_model: Annotated[str | None, typer.Option(help="The judge's name there.")] = None,
    differences: Annotated[
        bool, typer.Option("--differences", help="Print every answer that the extraction rules read differently.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Throw away what OUTPUT holds of an earlier run.")] = False,
    list_: Annotated[
        bool, typer.Option("--list", help="Describe the benchmarks (or those that are named) and leave.")
    ] = False,
) -> None:
    """Evaluate a model on benchmarks: predictions, scores with intervals, baselines."""
    from rich.console import Console

    console = Console()
    if list_:
        _print_benchmarks(console, benchmark)
        return
    for name, value in {"BENCHMARK": benchmark, "--model": model, "--data": data, "--output": output}.items():
        if value is None:
            raise UserError(f"{name} is missing. Try: llava-npu eval mmbench --model DIR --data FILE.tsv --output DIR")
    assert benchmark is not None
    assert model is not None
    assert data is not None
    assert output is not None

    from llava_npu.evaluation.ablations import IMAGE_MODES
    from llava_npu.evaluation.answering import ANSWER_MODES, no_options
    from llava_npu.evaluation.formats.datasets import read_dataset
    from llava_npu.evaluation.judge.client import JudgeClient, judge_settings
    from llava_npu.evaluation.processes import joined, launch, launched
    from llava_npu.hub.hubs import on_hub

    chosen = _choose(benchmark)
    _check_choice("--answer", answer, ANSWER_MODES)
    _check_choice("--images", images, IMAGE_MODES)
    settings = judge_settings(judge_url, judge_model)
    judge = JudgeClient(settings) if settings else None
    if len(chosen) > 1 and not data.is_dir():
        raise UserError(f"--data {data}: several benchmarks need a folder that holds the data of all of them.")
    for each in chosen:
        questions = read_dataset(each, data).questions  # bad data is reported before a model is loaded
        without = next((question for question in questions if not question.options), None)
        if without is not None and answer != ANSWER_MODES[0]:
            raise UserError(f"--answer {answer}, {each.name}: {no_options(without)}")
    if devices > 1 and launched() == 1:
        launch(devices, device, sys.argv[1:])
        return
    with joined() as processes:
        answerer_for = _load(on_hub(model, source), device, answer)
        for each in chosen:
            folder = output / each.name if len(chosen) > 1 else output
            answerer = answerer_for(max_new_tokens or each.max_new_tokens)
            report = _evaluate(console, each, data, answerer, folder, images, batch_size, fresh, judge, processes)
            if processes.is_first:
                _print_report(console, report, folder, differences)


def _choose(names: str) -> list[Benchmark]:
    from llava_npu.evaluation.benchmarks import get

    wanted = [name.strip() for name in names.split(",") if name.strip()]
    twice = sorted({name for name in wanted if wanted.count(name) > 1})
    if twice or not wanted:
        raise UserError(f"BENCHMARK {names!r}: {f'{twice[0]} is there twice' if twice else 'no name'}. See --list.")
    return [get(name) for name in wanted]


def _print_report(console: Console, report: Report, folder: Path, differences: bool) -> None:
    from llava_npu.evaluation.reports.report import as_terminal, differences_for_terminal

    console.print(as_terminal(report))
    if differences:
        console.print(differences_for_terminal(report))
    console.print(f"Predictions and report: {folder}")


def _load(model: str, device_name: str, answer: str) -> Callable[[int], Answerer]:
    """Loads the model; the function that comes back makes it answer in at most so many tokens."""
    import torch

    from llava_npu import devices
    from llava_npu.evaluation.answering import build_answerer
    from llava_npu.models import load

    device = devices.select(device_name)
    devices.apply_environment(device, lambda line: typer.echo(line, err=True))
    # 16 bits where the device computes in them, else fp32: on most CPUs 16-bit products are far slower.
    loaded = load(model, device=device.torch_device, dtype=device.autocast_dtype or torch.float32)
    return lambda max_new_tokens: build_answerer(answer, loaded, max_new_tokens=max_new_tokens, device=device.name)


def _evaluate(
    console: Console,
    benchmark: Benchmark,
    data: Path,
    answerer: Answerer,
    output: Path,
    images: str,
    batch_size: int,
    fresh: bool,
    judge: JudgeClient | None,
    processes: Processes,
) -> Report:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from llava_npu.evaluation import run as runner

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    share = f" (process 1 of {processes.count})" if processes.count > 1 else ""
    with Progress(*columns, console=console, disable=not processes.is_first) as bar:
        task = bar.add_task(benchmark.name)

        def show(progress: runner.Progress) -> None:
            unread = f", {progress.errors} unreadable" if progress.errors else ""
            doing = f"{benchmark.name}, judging" if progress.judging else f"{benchmark.name}{share}{unread}"
            bar.update(task, completed=progress.done, total=progress.total, description=doing)

        return runner.evaluate(
            benchmark,
            data,
            answerer,
            output,
            images=images,
            batch_size=batch_size,
            fresh=fresh,
            judge=judge,
            processes=processes,
            on_progress=show,
        )


def _check_choice(option: str, value: str, allowed: tuple[str, ...]) -> None:
    from llava_npu.errors import nearest

    if value not in allowed:
        raise UserError(f"{option} {value!r} is unknown.{nearest(value, allowed)} Allowed: {', '.join(allowed)}.")


def _print_benchmarks(console: Console, names: str | None) -> None:
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    from llava_npu.evaluation.benchmarks import available
    from llava_npu.evaluation.reports.reference import facts

    for benchmark in _choose(names) if names else available().values():
        console.print(Text.assemble((benchmark.name, "bold"), f"  {benchmark.title}"))
        table = Table.grid(padding=(0, 1))
        for name, text in facts(benchmark):
            table.add_row(Text(name, style="dim"), Text(text))
        console.print(Padding(table, (0, 0, 1, 2)))
