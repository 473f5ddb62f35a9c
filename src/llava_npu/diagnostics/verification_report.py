"""A verification as a table in the terminal, as Markdown for a bug report, and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich.table import Table
from rich.text import Text

from llava_npu.diagnostics.comparison import Comparison, Stage
from llava_npu.diagnostics.verify import Verification
from llava_npu.files.console import SafeConsole

FORMAT = 1  # of the JSON; raised when a field changes its meaning
_STAGES: tuple[Stage, ...] = ("forward", "gradient", "steps")
_SHOWN_FAILURES = 20

Row = tuple[Comparison, list[Comparison | None]]  # any comparison of the row, and the worst of each column


def show(result: Verification) -> None:
    """Prints everything to the terminal."""
    console = SafeConsole()
    columns = _columns(result)
    table = Table(title=_title(result), title_justify="left", title_style="bold", box=None, padding=(0, 1, 0, 0))
    table.add_column("relative error", no_wrap=True)
    for dtype, stage in columns:
        table.add_column(f"{dtype if stage == _STAGES[0] else ''}\n{stage}", justify="right", no_wrap=True)
    subject = ""
    for comparison, cells in _rows(result):
        name = comparison.subject
        if comparison.part:
            if comparison.subject != subject:
                table.add_row(Text(comparison.subject, style="bold"))
            name = f"  {comparison.part}"
        subject = comparison.subject
        table.add_row(name, *(_coloured(cell) for cell in cells))
    console.print(table)
    for line in ("", _limits(result), *_conclusion(result)):
        console.print(Text(line), soft_wrap=True)


def as_markdown(result: Verification) -> str:
    """Everything that a bug report needs, to paste as it is."""
    columns = _columns(result)
    lines = [
        f"### {_title(result)}",
        "",
        ", ".join(f"{name} {version}" for name, version in result.versions.items()),
        "",
        f"| relative error | {' | '.join(f'{dtype} {stage}' for dtype, stage in columns)} |",
        f"|---|{'---:|' * len(columns)}",
    ]
    for comparison, cells in _rows(result):
        lines.append(f"| {_place(comparison)} | {' | '.join(_marked(cell) for cell in cells)} |")
    return "\n".join([*lines, "", _limits(result), "", *_conclusion(result)])


def as_json(result: Verification) -> str:
    """Every comparison; an error that is not a number is null."""
    comparisons = [
        {**asdict(each), "error": each.error if math.isfinite(each.error) else None, "passed": each.passed}
        for each in result.comparisons
    ]
    report: dict[str, Any] = {"format": FORMAT, "passed": result.passed, **asdict(result), "comparisons": comparisons}
    return json.dumps(report, indent=2)


def _title(result: Verification) -> str:
    simulated = "" if not result.simulated or "simulated" in result.name else ", simulated"
    verdict = "passed" if result.passed else f"FAILED ({len(result.failures)} of {len(result.comparisons)})"
    return f"llava-npu verify: {result.name}{simulated} ({result.device}) against the CPU: {verdict}"


def _columns(result: Verification) -> list[tuple[str, Stage]]:
    dtypes = dict.fromkeys(each.dtype for each in result.comparisons)
    return [(dtype, stage) for dtype in dtypes for stage in _STAGES]


def _rows(result: Verification) -> Iterator[Row]:
    columns = _columns(result)
    rows: dict[tuple[str, str], dict[tuple[str, Stage], Comparison]] = {}
    for each in result.comparisons:
        cells = rows.setdefault((each.subject, each.part), {})
        worst = cells.get((each.dtype, each.stage))
        if worst is None or _excess(each) > _excess(worst):
            cells[each.dtype, each.stage] = each
    for cells in rows.values():
        yield next(iter(cells.values())), [cells.get(column) for column in columns]


def _place(comparison: Comparison) -> str:
    return f"{comparison.subject}: {comparison.part}" if comparison.part else comparison.subject


def _excess(comparison: Comparison) -> float:
    return math.inf if math.isnan(comparison.error) else comparison.error / comparison.limit


def _coloured(cell: Comparison | None) -> Text:
    if cell is None:
        return Text("")
    return Text(_number(cell), style="green" if cell.passed else "bold red")


def _marked(cell: Comparison | None) -> str:
    if cell is None:
        return ""
    return _number(cell) if cell.passed else f"**{_number(cell)}** ✗"


def _number(cell: Comparison) -> str:
    if cell.problem:
        return "raised"
    return f"{cell.error:.1e}" if math.isfinite(cell.error) else "not finite"


def _limits(result: Verification) -> str:
    limits: dict[tuple[str, str], dict[Stage, float]] = {}
    for each in result.comparisons:
        limits.setdefault((each.dtype, f"{each.kind}s"), {})[each.stage] = each.limit
    parts = [
        f"{dtype} {kind} " + "/".join(f"{limit:g}" for limit in by_stage.values())
        for (dtype, kind), by_stage in limits.items()
    ]
    return f"Limits (forward/gradient/change in training steps): {'; '.join(parts)}."


def _conclusion(result: Verification) -> Iterator[str]:
    if result.settings:
        yield f"Set for this comparison: {', '.join(result.settings)}."
    if result.simulated:
        yield "This device is simulated: the result shows that calls are right, nothing about hardware."
    if result.passed:
        yield f"All {len(result.comparisons)} comparisons passed in {result.seconds:.0f} s."
        return
    yield "Beyond their limits:"
    failures = sorted(result.failures, key=_excess, reverse=True)
    for each in failures[:_SHOWN_FAILURES]:
        found = each.problem or f"{_number(each)}, limit {each.limit:g}"
        yield f"- {_place(each)}, {each.dtype}, {each.quantity}: {found}"
    if len(failures) > _SHOWN_FAILURES:
        yield f"- and {len(failures) - _SHOWN_FAILURES} more (--json has all)"
    yield (
        "Operations show where the fault is; models follow them. Please report it, with this text: "
        "llava-npu verify --markdown"
    )
