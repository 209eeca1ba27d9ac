"""Tables of `benchmarks.kernels_gpu`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from benchmarks.kernels_gpu_marks import DENSE, TUNED, speed

Row = Mapping[str, Any]


def rows_table(layer: str, rows: Sequence[Row]) -> Table:
    """Forms down, tokens across: times the speed of the faster dense product; that one in milliseconds."""
    here = [row for row in rows if row["layer"] == layer]
    counts = sorted({row["tokens"] for row in here})
    table = Table(title=f"{layer}: times the speed of {DENSE} (share of the least time)", title_justify="left")
    table.add_column("")
    for count in counts:
        table.add_column(f"{count} tokens", justify="right")
    for name in dict.fromkeys(row["name"] for row in here):
        cells, reasons = [], list[str]()
        for count in counts:
            row = next((r for r in here if r["name"] == name and r["tokens"] == count), None)
            if row is not None and "absent" in row:
                reasons.append(row["absent"])
            cells.append("-" if row is None or "ratio" not in row else _cell(rows, row))
        style = "red" if any(r.get("wrong") for r in here if r["name"] == name and not r["peer"]) else ""
        table.add_row(name + (f" ({reasons[0]})" if reasons else ""), *cells, style=style)
    return table


def _cell(rows: Sequence[Row], row: Row) -> str:
    if row["name"] in (DENSE, TUNED):
        return f"{row['milliseconds']:.3g} ms"
    times, share = speed(rows, row, DENSE), row.get("share")
    told = "-" if times is None else f"{times:.3g}x"
    return told + (f" ({share:.0%})" if share is not None else "") + (" wrong" if row.get("wrong") else "")


def checks_table(checks: Sequence[Row], rows: Sequence[Row]) -> Table:
    """What was compared with its meaning, and what is not what it should be."""
    table = Table(title="against float64", title_justify="left")
    for heading in ("kernel", "form", "checks", "found"):
        table.add_column(heading)
    for check in checks:
        bad = check["failed"]
        if check["peer"] and bad:
            table.add_row(check["kernel"], check["case"], str(check["checks"]), bad[0], style="dim")
            continue
        if not check["checks"] and not bad:
            table.add_row(check["kernel"], check["case"], "0", "not for these numbers of tokens", style="dim")
            continue
        found = f"{len(bad)} wrong: {bad[0]}" if bad else f"right; at most {check['worst']:.2f} of what rounding allows"
        table.add_row(check["kernel"], check["case"], str(check["checks"]), found, style="red" if bad else "")
    for row in rows:
        if row.get("wrong") and "error" in row:
            error = "not finite" if row["error"] is None else f"off by {row['error']:.2g}, {row['limit']:.2g} allowed"
            place = f"{row['layer']}, {row['tokens']} tokens"
            table.add_row(row["kernel"], row["name"], place, error, style="dim" if row["peer"] else "red")
    return table


def marks_table(marks: Sequence[Row]) -> Table:
    """What kernels are held to; where several layers are asked for, the worst of them."""
    table = Table(title="held to: the worst of all layers, times the speed", title_justify="left")
    for heading in ("", "measured", "at least", "met", "rows", "where"):
        table.add_column(heading)
    for mark in marks:
        measured = "not measured" if mark["measured"] is None else f"{mark['measured']:.3g}"
        met = {True: "yes", False: "no", None: "-" if mark["measured"] is None else "so far"}[mark["met"]]
        style = {True: "green", False: "red", None: "dim"}[mark["met"]]
        table.add_row(
            mark["mark"],
            measured,
            f"{mark['at least']:.3g}",
            met,
            f"{mark['rows']} of {mark['of']}",
            mark.get("where", ""),
            style=style,
        )
    return table
