"""A ratchet: functions stay short enough to read on one screen, and the few longer ones only become fewer."""

from __future__ import annotations

import ast
from pathlib import Path

PRODUCT = Path(__file__).resolve().parent.parent / "src/llava_npu"
LONGEST, MOST_LONG = 60, 3


def test_no_more_long_functions() -> None:
    long = [
        f"{path.relative_to(PRODUCT)}:{node.lineno} {node.name}"
        for path in sorted(PRODUCT.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or node.lineno) - node.lineno >= LONGEST
    ]
    assert len(long) <= MOST_LONG, "\n".join(long)
