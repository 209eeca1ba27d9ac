"""A table that becomes a list where the terminal is too narrow for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

__all__ = ["Rows"]

# Columns of text may be folded down to this width; numbers are never folded.
_ROOM = 20
_GAP = 3  # between columns


class Rows(Table):
    """A table of rich; where its columns would be cut or folded to shreds, each row is a few lines: its name, then what is known.

    Parameters
    ----------
    title
        Above it.
    columns
        Headings, and whether each is of numbers, which are aligned to the right and never folded.

    Examples
    --------
    >>> table = Rows("Sites", [("site", False), ("form", False), ("bytes", True)])
    >>> table.add_row("encoder.layer.0.attention.self.query", "int8", "590 KB")
    >>> Console(width=24).print(table)
    Sites
    encoder.layer.0.attentio
    n.self.query
      form int8, bytes 590
      KB
    """

    def __init__(self, title: str, columns: Sequence[tuple[str, bool]]) -> None:
        super().__init__(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
        for heading, number in columns:
            justify: Any = "right" if number else "left"
            self.add_column(heading, justify=justify, no_wrap=number, overflow="fold")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self._least() <= options.max_width:
            yield from super().__rich_console__(console, options)
            return
        yield Text(str(self.title or ""), style="bold")
        headings = [str(column.header) for column in self.columns]
        for cells in zip(*(column.cells for column in self.columns), strict=True):
            first, *rest = (cell if isinstance(cell, Text) else Text.from_markup(str(cell)) for cell in cells)
            yield Text(overflow="fold").append_text(first)
            known = [
                Text.assemble((heading, "dim"), " " if heading else "", cell)
                for heading, cell in zip(headings[1:], rest, strict=True)
                if cell.plain
            ]
            if known:
                yield Padding(Text(", ").join(known), (0, 0, 0, 2), expand=False)

    def _least(self) -> int:
        """The width below which this is no table to read."""
        total = 0
        for column in self.columns:
            texts = [str(column.header), *(c.plain if isinstance(c, Text) else str(c) for c in column.cells)]
            widest = max(cell_len(line) for text in texts for line in (text.splitlines() or [""]))
            total += (widest if column.no_wrap else min(widest, _ROOM)) + _GAP
        return total
