"""Tables of text, for Markdown files and terminals; CSV files are `untrusted.csv_text`'s."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llava_npu.files.untrusted import markdown_text

if TYPE_CHECKING:
    from rich.table import Table as RichTable


@dataclass(frozen=True)
class TextTable:
    """Cells of plain text, which may come from models and data. Lines within a cell stay lines.

    Attributes:
        columns: their heads.
        rows: as many cells each.
        num_names: how many columns in front hold names; the others hold numbers, aligned on the right.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    num_names: int = 1

    def as_markdown(self) -> str:
        """The table with a line break at its end."""

        def line(cells: Iterable[str]) -> str:
            return "| " + " | ".join("<br>".join(map(markdown_text, cell.split("\n"))) for cell in cells) + " |\n"

        rule = ["---"] * self.num_names + ["---:"] * (len(self.columns) - self.num_names)
        return "".join([line(self.columns), f"| {' | '.join(rule)} |\n", *map(line, self.rows)])

    def as_terminal(self, title: str = "", sections: Mapping[int, str] | None = None, **options: Any) -> RichTable:
        """The table for a rich console.

        Args:
            title: above it.
            sections: a heading before the row of that number.
            options: of `rich.table.Table`.
        """
        from rich.markup import escape
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(title=escape(title) or None, **options)
        for number, column in enumerate(self.columns):
            # All may wrap: in a narrow terminal the widest give way first, and no column vanishes.
            table.add_column(escape(column), justify="left" if number < self.num_names else "right", overflow="fold")
        for number, row in enumerate(self.rows):
            if sections and number in sections:
                table.add_section()
                table.add_row(Text(sections[number], style="italic"))
            table.add_row(*map(escape, row))
        return table
