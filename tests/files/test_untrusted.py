"""What models and data say stays text: in a terminal, in a spreadsheet, in a Markdown viewer, in every report."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import replace
from pathlib import Path

import markdown
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table
from rich.text import Text

import llava_npu
from llava_npu.evaluation.reports.report import Difference, Report, as_terminal, write_report
from llava_npu.evaluation.statistics.accuracy import Score
from llava_npu.files import tables
from llava_npu.files.console import SafeConsole
from llava_npu.files.untrusted import csv_text, markdown_code, markdown_text, printable


def read_csv(text: str) -> list[list[str]]:
    return list(csv.reader(io.StringIO(text, newline="")))


@pytest.mark.parametrize(
    "formula", ["=1+1", "+1+1", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "=A1&B1", "＝1", " =1"]
)
def test_formulas_are_text(formula: str) -> None:
    cell = "'" + formula.replace("\r", "\n")
    assert read_csv(csv_text(["a", formula], [[1, formula]])) == [["a", cell], ["1", cell]]


@pytest.mark.parametrize("value", ["a=b", "1-2", "", "-1.5", "+3", "-1e-05", "'quoted", "x@y", "a,b\nc", "a\r=1"])
def test_what_is_no_formula_stays(value: str) -> None:
    assert read_csv(csv_text(["a"], [[value], [-0.5], [None]])) == [["a"], [value.replace("\r", "\n")], ["-0.5"], [""]]


def test_cells_steer_no_terminal() -> None:
    assert csv_text(["\x1b]0;title\x07"], [["\u202ea\0"]]) == "\\x1b]0;title\\x07\n\\u202ea\\x00\n"


@given(st.text(max_size=30))
def test_no_cell_begins_a_formula(text: str) -> None:
    rows = read_csv(csv_text([text.replace("\0", ""), "b"], []))
    assert len(rows) == 1
    assert not rows[0][0].startswith(("=", "@", "\t", "\r", "\n"))


def test_control_characters_are_spelled_out() -> None:
    assert printable("a\tcat\n\x1b]0;title\x07\x9b2J猫\r") == "a\tcat\n\\x1b]0;title\\x07\\x9b2J猫\\r"
    assert printable("\u202eexe.cat\u2028\ud83d") == "\\u202eexe.cat\\u2028\\ud83d"
    assert printable("👩\u200d👩\u200d👧 naïve\u00a0猫") == "👩\u200d👩\u200d👧 naïve\u00a0猫"


def test_the_console_spells_them_out_everywhere() -> None:
    table = Table("\x1b[31mhead", title="\x1b]0;title\x07")
    table.add_row("\x1b[2Jcell")
    stream = io.StringIO()
    console = SafeConsole(file=stream, force_terminal=True, width=80)
    console.print(table, Text("\x9b2J", style="bold"))
    written = stream.getvalue()
    assert "\x1b[2J" not in written
    assert "\x1b[31m" not in written
    assert not {"\x07", "\x9b"} & set(written)
    assert "\x1b[1m" in written  # its own styles still work


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<img src=https://evil.example/x>", "&lt;img src=https://evil.example/x>"),
        ("![cat](https://evil.example/x.png)", "!\\[cat\\](https://evil.example/x.png)"),
        ("[click](javascript:alert(1))", "\\[click\\](javascript:alert(1))"),
        ("<https://evil.example>", "&lt;https://evil.example>"),
        ("a | b\n# c", "a \\| b # c"),
        ("&lt;script>", "&amp;lt;script>"),
        ("*bold* `code` \\", "\\*bold\\* \\`code\\` \\\\"),
        ("p < 0.001, A & B, coarse_perception", "p < 0.001, A & B, coarse_perception"),
        ("\x1b[31m", "\\\\x1b\\[31m"),
    ],
)
def test_markdown_is_text(text: str, shown: str) -> None:
    escaped = markdown_text(text)
    assert escaped == shown.replace("\\\\x1b", "\\\\x1b")


def test_code_and_tables_end_where_they_should() -> None:
    assert markdown_code("a ` b `` c") == "```a ` b `` c```"
    assert markdown_code("`") == "`` ` ``"
    table = tables.TextTable(["a|b", "n"], [["<script>", "1\n2"]]).as_markdown().splitlines()
    assert table == ["| a\\|b | n |", "| --- | ---: |", "| &lt;script> | 1<br>2 |"]


def test_no_report_writes_csv_by_itself() -> None:
    package = Path(llava_npu.__file__).parent
    writers = [
        path for path in package.rglob("*.py") if re.search(r"csv\.(writer|DictWriter)", path.read_text("utf-8"))
    ]
    assert [path.name for path in writers] == ["untrusted.py"]


EVIL = "=cmd|' /C calc'!A0<img src=https://evil.example/x>![x](https://evil.example/y)\x1b]0;t\x07"


def test_reports_of_hostile_names(tmp_path: Path) -> None:
    """A category, a split, an answer and a model name that would act: in the evaluation's files and on the terminal."""
    score = Score("accuracy", "strict", "", "overall", "overall", 0.5, 0.4, 0.6, 4)
    scores = (score, replace(score, level="category", name=EVIL), replace(score, split=EVIL))
    differences = (Difference(EVIL, "A", EVIL, {"strict": "A", "loose": None}),)
    report = Report("mmbench", EVIL, EVIL, 4, 4, 0, 1.0, scores, (EVIL,), differences, {"model": EVIL})
    write_report(report, tmp_path)
    for name in ("scores.csv", "differences.csv"):
        rows = read_csv((tmp_path / name).read_text("utf-8"))
        assert any(EVIL[1:5] in cell for row in rows for cell in row)
        assert not [cell for row in rows for cell in row if cell.startswith("=")]
    page = (tmp_path / "report.md").read_text("utf-8")
    rendered = markdown.markdown(page, extensions=["tables"])
    assert "cmd" in rendered
    assert "<img" not in rendered
    assert "\x1b" not in page
    stream = io.StringIO()
    SafeConsole(file=stream, force_terminal=True, width=200).print(as_terminal(report))
    assert "\x1b]0" not in stream.getvalue()


@given(st.text("<>!&;[]()`*_|\\ \n#-imgsrc=hp:/.x\"'", max_size=60))
def test_markdown_renders_without_elements(text: str) -> None:
    """Whatever the text is made of, a renderer makes a paragraph of it and nothing else that acts."""
    html = markdown.markdown(f"- a: {markdown_text(text)}")
    for element in ("<img", "<a ", "<script", "<code", "<i ", "<s ", "<p "):
        assert element not in html, html
