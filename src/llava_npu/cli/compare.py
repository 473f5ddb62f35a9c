"""`llava-npu compare`: a grid of models, trained and measured, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llava_npu.errors import UserError
from llava_npu.files.home import expand_home

if TYPE_CHECKING:
    from llava_npu.comparison.table import TrialRow
    from llava_npu.config.comparison import ComparisonConfig


def compare(
    config: Annotated[list[str], typer.Argument(help="A YAML file or name (recipes/), then key=value …; or folders.")],
    report: Annotated[
        bool,
        typer.Option(
            "--report", help="Train nothing: a report of the folders given (comparisons, trials, runs, evaluations)."
        ),
    ] = False,
    published: Annotated[
        str | None,
        typer.Option(
            help="Train nothing: set a published table (TABLE or TABLE/MODEL,…; see docs/comparison.md) next to the "
            "evaluations in the folders given."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder of the report with --report (by default the first folder given) or --published."),
    ] = None,
    device: Annotated[
        list[str] | None, typer.Option(help="Such as npu:0 or cpu; repeat it for several: trials run in parallel.")
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Run trials again that failed before; otherwise they are skipped.")
    ] = False,
    debug_size: Annotated[
        bool, typer.Option("--debug-size", help="Try the grid in minutes, on tiny models and data made on the spot.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the trials and exit.")] = False,
) -> None:
    """Train and measure every encoder with every projector, and compare them. The same command resumes.

    Exit status 1 if a trial failed.
    """
    if report or published:
        if device or retry_failed or dry_run or debug_size or (report and published):
            raise UserError("--report and --published run nothing; only --output can be combined with one of them.")
        folders = [expand_home(folder) for folder in config]
        _report(folders, output) if published is None else _with_published(published, folders, output)
        return
    if output is not None:
        raise UserError(
            "--output is for --report and --published; the folder of a comparison is `output` in its file: output=DIR."
        )
    comparison, file = _read(config, debug_size)
    if dry_run:
        from llava_npu.comparison.grid import expand

        for trial in expand(comparison, str(file)):
            typer.echo(f"{trial.name}\n  {trial.folder}")
        return
    from llava_npu.comparison.run import compare as run_comparison

    page, lines = run_comparison(comparison, str(file), devices=device or (), retry_failed=retry_failed)
    _show(lines, page)
    if any(line.failure and line.failure.kind == "failed" for line in lines):
        raise typer.Exit(1)


def _read(config: list[str], debug_size: bool) -> tuple[ComparisonConfig, Path]:
    """The comparison and its file; at debug size with what it needs made."""
    from llava_npu.config import load_as
    from llava_npu.config.comparison import ComparisonConfig
    from llava_npu.config.recipes import find_comparison

    file = find_comparison(config[0])
    comparison = load_as(ComparisonConfig, file, config[1:])
    if not debug_size:
        return comparison, file
    from llava_npu.debug_size.assets import make_assets, make_questions
    from llava_npu.debug_size.config import ASSETS, comparison_at_debug_size

    comparison = comparison_at_debug_size(comparison, file)
    make_assets(ASSETS)
    make_questions(ASSETS)
    return comparison, file


def _report(folders: list[Path], output: Path | None) -> None:
    from llava_npu.comparison.existing import report_on

    page, lines = report_on(folders, output or folders[0])
    _show(lines, page)


def _with_published(name: str, folders: list[Path], output: Path | None) -> None:
    from llava_npu.comparison.published import evaluations_in, read_published, table_with_ours
    from llava_npu.files.atomic import write_text
    from llava_npu.files.console import SafeConsole

    published = read_published(name)
    table = table_with_ours(published, evaluations_in(folders))
    notes = [f"Published: {published.source}.", *([published.note] if published.note else [])]
    notes += [f"{row}: {model.setting}." for row, model in published.models.items()]
    console = SafeConsole()
    console.print(table.as_terminal(f"{published.title} and ours"))
    for note in notes:
        console.print(note, style="dim", markup=False, highlight=False)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        text = "".join(f"\n{note}\n" for note in notes)
        write_text(output / "published.md", f"# {published.title} and ours\n\n{table.as_markdown()}{text}")
        console.print(f"Table: {output / 'published.md'}", soft_wrap=True, highlight=False)


def _show(lines: list[TrialRow], page: Path) -> None:
    from llava_npu.comparison.table import as_terminal
    from llava_npu.files.console import SafeConsole

    console = SafeConsole()
    console.print(as_terminal(lines))
    console.print(f"Tables, plot and page: {page}", soft_wrap=True, highlight=False)
