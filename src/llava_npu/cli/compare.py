"""`llava-npu compare`: a grid of models, trained and measured, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llava_npu.errors import UserError
from llava_npu.files.home import expand_home

if TYPE_CHECKING:
    from llava_npu.comparison.table import TrialRow


def compare(
    config: Annotated[list[str], typer.Argument(help="A YAML file or name (recipes/), then key=value …; or folders.")],
    report: Annotated[
        bool,
        typer.Option(
            "--report", help="Train nothing: a report of the folders given (comparisons, trials, runs, evaluations)."
        ),
    ] = False,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the report with --report; by default the first folder given.")
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
    if report:
        if device or retry_failed or dry_run or debug_size:
            raise UserError("--report runs nothing; only --output can be combined with it.")
        _report([expand_home(folder) for folder in config], output)
        return
    if output is not None:
        raise UserError("--output is for --report; the folder of a comparison is `output` in its file: output=DIR.")
    from llava_npu.config import load_as
    from llava_npu.config.comparison import ComparisonConfig
    from llava_npu.config.recipes import find_comparison

    file = find_comparison(config[0])
    comparison = load_as(ComparisonConfig, file, config[1:])
    if debug_size:
        from llava_npu.debug_size.assets import make_assets, make_questions
        from llava_npu.debug_size.config import ASSETS, comparison_at_debug_size

        comparison = comparison_at_debug_size(comparison, file)
        make_assets(ASSETS)
        make_questions(ASSETS)
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


def _report(folders: list[Path], output: Path | None) -> None:
    from llava_npu.comparison.existing import report_on

    page, lines = report_on(folders, output or folders[0])
    _show(lines, page)


def _show(lines: list[TrialRow], page: Path) -> None:
    from llava_npu.comparison.table import as_terminal
    from llava_npu.files.console import SafeConsole

    console = SafeConsole()
    console.print(as_terminal(lines))
    console.print(f"Tables, plot and page: {page}", soft_wrap=True, highlight=False)
