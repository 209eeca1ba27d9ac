"""Rows of `benchmarks.fidelity` as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

Row = Mapping[str, Any]
MEASURES = ("perplexity", "cosine", "worst_cosine", "same_neighbour")


def key_of(row: Row) -> tuple[str, str, str]:
    """What tells a row from all others: model, form and budget."""
    return row["model"], row["form"], said(row["budget"])


def said(budget: float | str | None) -> str:
    """A budget in words.

    Examples
    --------
    >>> said(0.375), said("int3(group=32)"), said(None)
    ('37.5%', 'as int3(group=32)', 'own')
    """
    if budget is None:
        return "own"
    return f"as {budget}" if isinstance(budget, str) else f"{budget * 100:g}%"


def rows_table(rows: list[dict[str, Any]], title: str) -> Table:
    """All rows of one model."""
    measures = [name for name in MEASURES if any(name in row for row in rows)]
    table = Table(title=f"fidelity of {title}", title_justify="left")
    for heading in ("form", "setting", "budget"):
        table.add_column(heading, overflow="fold")
    for heading in ("share", *measures, "layer error", "worst", "fit s"):
        table.add_column(heading, justify="right")
    kind = ""
    for row in rows:
        if kind and row["kind"] != kind:
            table.add_section()
        kind = row["kind"]
        cells = [row["form"], row["text"], said(row["budget"])]
        if "failed" in row:
            table.add_row(*cells, row["failed"], style="red")
            continue
        figures = [f"{row[name]:.4g}" if name in row else "-" for name in measures]
        errors = [
            f"{row[name]:.4f}" if row.get(name) is not None else "-" for name in ("layer_error", "worst_layer_error")
        ]
        seconds = f"{row['fit_seconds']:.1f}" if row.get("fit_seconds") is not None else "-"
        table.add_row(*cells, f"{row['share']:.1%}", *figures, *errors, seconds)
    return table
