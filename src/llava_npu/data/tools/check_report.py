"""A data check's findings for people, in the terminal."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from llava_npu.data.tools.check import WARNINGS, CheckOptions, CheckReport
from llava_npu.files.atomic import write_text
from llava_npu.files.untrusted import printable


def print_report(report: CheckReport, options: CheckOptions, console: Console) -> None:
    """Counts by kind, examples, and what was not looked at."""
    if report.findings:
        table = Table("defect", "records", box=None, pad_edge=False)
        table.columns[1].justify = "right"
        for kind, found in report.findings.items():
            table.add_row(Text(kind, style=_style(kind)), f"{found.count:,}")
        console.print(table)
    for kind, found in report.findings.items():
        console.print(Text(f"\n{kind}", style=f"bold {_style(kind)}"))
        for example in found.examples:
            console.print(Text(f"  {printable(example)}"), soft_wrap=True)
        if found.count > len(found.examples):
            console.print(Text(f"  … and {found.count - len(found.examples):,} more"))
    longest = "" if report.longest is None else f", the longest sample {report.longest:,} tokens"
    bad = "none of them bad" if not report.num_bad else f"{report.num_bad:,} of them cannot be trained on"
    console.print(Text(f"\n{report.num_records:,} records with {report.num_images:,} images{longest}; {bad}"))
    for missing in not_checked(options):
        console.print(Text(f"not checked: {missing}", style="yellow"))


def write_report(report: CheckReport, options: CheckOptions, path: Path) -> None:
    """Writes the report as JSON, whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    write_text(path, json.dumps({**report.as_json(), "not_checked": not_checked(options)}, indent=1) + "\n")


def not_checked(options: CheckOptions) -> list[str]:
    """What these options leave out."""
    missing = []
    if options.images == "ignore":
        missing.append("images (--images ignore)")
    elif options.images == "exist":
        missing.append("whether images can be decoded (--images exist)")
    if options.tokenizer is None:
        missing.append("lengths, and what the template refuses (give --tokenizer)")
    elif options.max_length is None:
        missing.append("whether samples are too long (give --max-length)")
    elif not options.image_tokens and options.images != "ignore":
        missing.append("how much longer images make a sample (give --image-tokens)")
    return missing


def _style(kind: str) -> str:
    return "yellow" if kind in WARNINGS else "red"
