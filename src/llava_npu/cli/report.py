"""`llava-npu report`: finished evaluations side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llava_npu.cli.options import BENCHMARK_MODULE


def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Folders of finished evaluations; the others are compared with the first.")
    ],
    output: Annotated[
        Path | None, typer.Option(help="Folder for comparison.md, .csv, .json and a page of all answers (.html).")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="The benchmark's data, for the page, if it is not where the runs found it.")
    ] = None,
    benchmark_module: Annotated[list[str] | None, BENCHMARK_MODULE] = None,
) -> None:
    """Compare evaluations: scores side by side, differences with their intervals and paired tests."""
    from rich.text import Text

    from llava_npu.evaluation.benchmarks import load_modules
    from llava_npu.evaluation.reports.comparison import compare_runs, read_runs
    from llava_npu.evaluation.reports.comparison_report import as_terminal, write_comparison
    from llava_npu.evaluation.statistics.accuracy import OVERALL
    from llava_npu.files.console import SafeConsole

    load_modules(benchmark_module or ())
    console = SafeConsole()
    comparisons = compare_runs(read_runs(runs))
    for comparison in comparisons:
        console.print(as_terminal(comparison))
        if output is None and any(row.name.level != OVERALL for row in comparison.rows):
            console.print(Text("By l2-category, and question by question: --output FOLDER", style="dim"))
        if output is not None:
            folder = output / comparison.benchmark if len(comparisons) > 1 else output
            for note in write_comparison(comparison, folder, data):
                console.print(Text(f"! {note}", style="yellow"))
            console.print(f"Comparison: {folder}")
