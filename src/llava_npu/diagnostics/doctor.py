"""`llava-npu doctor`: from the facts of this machine to findings, and both to a table or to JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from llava_npu.diagnostics.checks import CHECKS
from llava_npu.diagnostics.findings import Finding, Level
from llava_npu.diagnostics.machine import Machine, look
from llava_npu.version import __version__

FORMAT = 1  # of the JSON; raised when a field changes its meaning
_MARKS = {Level.OK: ("✓", "green"), Level.WARNING: ("!", "yellow"), Level.ERROR: ("✗", "red")}


def diagnose(timeout: float) -> tuple[Machine, list[Finding]]:
    """Looks at this machine; devices get `timeout` seconds to answer."""
    machine = look(timeout)
    return machine, findings(machine)


def findings(machine: Machine) -> list[Finding]:
    """All findings on a machine, in the order in which one would look."""
    return [finding for check in CHECKS for finding in check(machine)]


def count(found: Sequence[Finding], level: Level) -> int:
    return sum(finding.level == level for finding in found)


def as_json(machine: Machine, found: Sequence[Finding]) -> str:
    """Facts and findings, for programs and bug reports."""
    report: dict[str, Any] = {
        "format": FORMAT,
        "llava_npu": __version__,
        "simulated": machine.simulated,
        "errors": count(found, Level.ERROR),
        "warnings": count(found, Level.WARNING),
        "findings": [asdict(finding) for finding in found],
        "machine": asdict(machine),
    }
    return json.dumps(report, indent=2, default=str)


def show(found: Sequence[Finding]) -> None:
    """Prints one line for each thing that is well, and what, why and fix for each that is not."""
    from rich.text import Text

    from llava_npu.files.console import SafeConsole

    console = SafeConsole()
    width = max(len(finding.check) for finding in found)
    indent = " " * (width + 4)
    for finding in found:
        mark, colour = _MARKS[finding.level]
        line = Text.assemble((mark, f"bold {colour}"), f" {finding.check:<{width}}  {finding.what}")
        console.print(line, soft_wrap=True)
        if finding.why:
            console.print(Text(f"{indent}{finding.why}", style="dim"), soft_wrap=True)
        if finding.fix:
            console.print(Text.assemble(f"{indent}fix: ", (finding.fix, "bold")), soft_wrap=True)
    errors, warnings = count(found, Level.ERROR), count(found, Level.WARNING)
    summary = f"\n{_several(errors, 'error')}, {_several(warnings, 'warning')}"
    console.print(summary, style="bold red" if errors else "bold")


def _several(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
