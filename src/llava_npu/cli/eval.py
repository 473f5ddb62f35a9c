"""`llava-npu eval`: puts a benchmark's questions to a model and scores the answers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from llava_npu.cli.options import BENCHMARK_MODULE, HUB, IMAGE_TOKENS, TEMPLATE, launch_and_exit
from llava_npu.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from llava_npu.evaluation.benchmarks import Benchmark
    from llava_npu.evaluation.judge.client import JudgeClient
    from llava_npu.evaluation.processes import Processes
    from llava_npu.evaluation.questions import Answerer
    from llava_npu.evaluation.reports.report import Report

_Given = TypeVar("_Given")

_OUTPUT = typer.Option(help="Folder for predictions and report; an interrupted run is resumed.")
_PREDICTIONS = typer.Option(
    help="Score these answers instead of running a model: LLaVA's .jsonl, VLMEvalKit's .xlsx, lmms-eval's sample log, "
    "or predictions.jsonl."
)
_ANSWER = typer.Option(help="generate, or choose the likeliest option: likelihood (its text), likelihood-letter.")
_IMAGES = typer.Option(help="given; baselines: none (no image), shuffled (another question's image).")


def eval_(
    benchmark: Annotated[str | None, typer.Argument(help="Its name; several: NAME,NAME. See --list.")] = None,
    model: Annotated[str | None, typer.Option(help="Model folder, run folder or hub id.")] = None,
    data: Annotated[Path | None, typer.Option(help="The benchmark's file, or a folder of benchmarks.")] = None,
    output: Annotated[Path | None, _OUTPUT] = None,
    predictions: Annotated[Path | None, _PREDICTIONS] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered at once.")] = 8,
    answer: Annotated[str, _ANSWER] = "generate",
    images: Annotated[str, _IMAGES] = "given",
    source: Annotated[str, HUB] = "huggingface",
    template: Annotated[str | None, TEMPLATE] = None,
    image_tokens: Annotated[int | None, IMAGE_TOKENS] = None,
    device: Annotated[str, typer.Option(help="auto, npu, cuda or cpu; with an index as in npu:1.")] = "auto",
    devices: Annotated[
        int, typer.Option(min=1, help="Number of devices of this machine that share the work, one process each.")
    ] = 1,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Maximum length of an answer in tokens. Default: the benchmark's.")
    ] = None,
    judge_url: Annotated[
        str | None, typer.Option(help="A judge's OpenAI-compatible endpoint; its key: LLAVA_NPU_JUDGE_KEY.")
    ] = None,
    judge_model: Annotated[str | None, typer.Option(help="The judge's name there.")] = None,
    benchmark_module: Annotated[list[str] | None, BENCHMARK_MODULE] = None,
    differences: Annotated[
        bool, typer.Option("--differences", help="Print every answer that the extraction rules read differently.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Discard what OUTPUT holds of an earlier run.")] = False,
    list_: Annotated[
        bool, typer.Option("--list", help="Describe the benchmarks (or those that are named) and exit.")
    ] = False,
) -> None:
    """Evaluate a model on benchmarks: predictions, scores with intervals, baselines."""
    from llava_npu.data.conversation.templates import get_template
    from llava_npu.evaluation.benchmarks import load_modules
    from llava_npu.files.console import SafeConsole

    console = SafeConsole()
    load_modules(benchmark_module or ())
    if list_:
        _print_benchmarks(console, benchmark)
        return
    chosen = _choose(_need("BENCHMARK", benchmark))
    _need("--model", model or predictions)
    folders = _need("--data", data), _need("--output", output)
    request = _Request(chosen, *folders, images, batch_size, answer, max_new_tokens, fresh, differences)
    request.check(predictions, model)
    request.judge = _judge(judge_url, judge_model)
    if predictions is not None:
        _score_stored(console, request, predictions)
        return
    prompted = get_template(template).name if template else None
    loaded = _Model(_need("--model", model), source, prompted, image_tokens, device)
    if devices > 1:
        _launch_processes(devices, device)
    _run(console, request, loaded)


def _need(name: str, value: _Given | None) -> _Given:
    if value is None:
        raise UserError(f"{name} is missing. Try: llava-npu eval mmbench --model DIR --data FILE.tsv --output DIR")
    return value


@dataclass
class _Request:
    """What is to be evaluated, as the command line asks for it."""

    benchmarks: list[Benchmark]
    data: Path
    output: Path
    images: str
    batch_size: int
    answer: str
    max_new_tokens: int | None
    fresh: bool
    differences: bool
    judge: JudgeClient | None = None

    def check(self, predictions: Path | None, model: str | None) -> None:
        """Raises `UserError` for options that cannot be, and for bad data: before a model is loaded."""
        from llava_npu.evaluation.ablations import IMAGE_MODES
        from llava_npu.evaluation.answering import ANSWER_MODES, no_options
        from llava_npu.evaluation.formats.datasets import read_dataset

        _check_choice("--answer", self.answer, ANSWER_MODES)
        _check_choice("--images", self.images, IMAGE_MODES)
        if predictions is not None:
            if model is not None:
                raise UserError("--predictions scores stored answers: leave out --model.")
            if len(self.benchmarks) > 1 or self.images != IMAGE_MODES[0] or self.answer != ANSWER_MODES[0]:
                raise UserError("--predictions takes one benchmark, with --images given and --answer generate.")
        if len(self.benchmarks) > 1 and not self.data.is_dir():
            raise UserError(f"--data {self.data}: several benchmarks need a folder that holds the data of all of them.")
        for each in self.benchmarks:
            questions = read_dataset(each, self.data).questions
            without = next((question for question in questions if not question.options), None)
            if without is not None and self.answer != ANSWER_MODES[0]:
                raise UserError(f"--answer {self.answer}, {each.name}: {no_options(without)}")

    def folder(self, benchmark: Benchmark) -> Path:
        return self.output / benchmark.name if len(self.benchmarks) > 1 else self.output


@dataclass(frozen=True)
class _Model:
    """Which model, from which hub, prompted how, with how many tokens of an image, on which device."""

    name: str
    source: str
    template: str | None
    image_tokens: int | None
    device: str


def _run(console: Console, request: _Request, model: _Model) -> None:
    from llava_npu.evaluation.processes import joined

    with joined() as processes:
        answerer_for = _load(model, request.answer)
        for benchmark in request.benchmarks:
            answerer = answerer_for(request.max_new_tokens or benchmark.max_new_tokens)
            report = _evaluate(console, request, benchmark, answerer, processes)
            if processes.is_first:
                _print_report(console, report, request.folder(benchmark), request.differences)


def _score_stored(console: Console, request: _Request, predictions: Path) -> None:
    from llava_npu.evaluation.formats.datasets import read_dataset
    from llava_npu.evaluation.processes import ALONE
    from llava_npu.evaluation.stored_answers import StoredAnswers

    (benchmark,) = request.benchmarks
    answers = StoredAnswers(predictions, read_dataset(benchmark, request.data).questions)
    report = _evaluate(console, request, benchmark, answers, ALONE)
    _print_report(console, report, request.output, request.differences)


def _launch_processes(count: int, device: str) -> None:
    """Runs this command in one process per device and exits; does nothing in such a process itself."""
    from llava_npu.distributed.launched import world_size
    from llava_npu.evaluation.processes import check_devices

    if world_size() == 1:
        check_devices(count, device)
        launch_and_exit(sys.argv[1:], count, "What was answered is kept; run the same command again to resume.")


def _judge(url: str | None, model: str | None) -> JudgeClient | None:
    from llava_npu.evaluation.judge.client import JudgeClient, judge_settings

    settings = judge_settings(url, model)
    return JudgeClient(settings) if settings else None


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


def _load(model: _Model, answer: str) -> Callable[[int], Answerer]:
    """Loads the model; the returned function limits its answers to a number of tokens."""
    import torch

    from llava_npu import devices
    from llava_npu.evaluation.answering import build_answerer
    from llava_npu.hub.hubs import on_hub
    from llava_npu.models import load

    device = devices.select(model.device)
    devices.apply_environment(device, lambda line: typer.echo(line, err=True))
    # 16 bits where the device computes in them, else fp32: on most CPUs 16-bit products are far slower.
    dtype = device.autocast_dtype or torch.float32
    loaded = load(on_hub(model.name, model.source), device.torch_device, dtype, template=model.template)
    loaded = loaded.with_image_tokens(model.image_tokens)
    return lambda max_new_tokens: build_answerer(answer, loaded, max_new_tokens=max_new_tokens, device=device.name)


def _evaluate(
    console: Console, request: _Request, benchmark: Benchmark, answerer: Answerer, processes: Processes
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
            request.data,
            answerer,
            request.folder(benchmark),
            runner.EvaluationOptions(
                images=request.images,
                batch_size=request.batch_size,
                fresh=request.fresh,
                judge=request.judge,
                processes=processes,
                on_progress=show,
            ),
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
