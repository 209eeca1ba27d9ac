"""Reports as tables for a terminal, through rich."""

from __future__ import annotations

import io
import shutil
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from recast.passes.render.words import bytes_text, change_text, count_text, error_text, milliseconds_text, times_text

if TYPE_CHECKING:
    from rich.table import Table

    from recast.passes.report import Report

__all__ = ["baseline", "comparison_table", "report_tables", "table_text"]


def table_text(report: Report, width: int | None = None) -> str:
    """The report as plain text, `width` columns wide; by default as wide as the terminal, or 120."""
    from rich.console import Console

    width = width or shutil.get_terminal_size((120, 24)).columns

    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False)
    for part in report_tables(report):
        console.print(part)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]  # it is the StringIO above
    return "\n".join(line.rstrip() for line in text.splitlines())


def report_tables(report: Report, *, most: int | None = None) -> list[Any]:
    """What rich prints of a report: a summary, the sites, what was skipped, and what was not matched.

    Parameters
    ----------
    report
        The report.
    most
        Show at most so many sites (the least accurate first to go in); all by default.
    """
    return [_summary(report), *_sites(report, most), *_skipped(report), *_misses(report), *_notes(report)]


def _text(value: object, style: str = "") -> Any:
    # Names come from models: as Text, square brackets in them are not taken for markup.
    from rich.text import Text

    return Text(str(value), style=style)


def _table(title: str, columns: Sequence[tuple[str, str]]) -> Table:
    from recast.passes.render.rows import Rows

    return Rows(title, [(name, align == "right") for name, align in columns])


def _summary(report: Report) -> Any:
    flops = report.flops
    lines = [
        f"{report.model} for {report.target}: {len(report.rows)} sites rewritten, {len(report.skipped)} left dense",
    ]
    sizes = bytes_text(report.bytes_before), bytes_text(report.bytes_after)
    lines.append(f"weights  {sizes[0]} → {sizes[1]} ({change_text(report.bytes_before, report.bytes_after)})")
    if flops[0]:
        lines.append(f"sites    {count_text(flops[0])} → {count_text(flops[1])} FLOPs a token")
    for name, figures in report.whole.items():
        cosine = f", mean cosine {figures['mean_cosine']:.5f}" if "mean_cosine" in figures else ""
        worst = f", worst {figures['worst_cosine']:.5f}" if "worst_cosine" in figures else ""
        error = error_text(figures.get("relative_error"))
        lines.append(f"{name}, first batch: relative error {error}{cosine}{worst}")
    for name, figures in report.agreement.items():
        error = error_text(figures.get("relative_error"))
        lines.append(f"{name}: {report.target} and the eager rewritten program differ by {error}")
    covered = report.coverage.get("parameters")
    if covered:
        share = covered["matched"] / covered["total"] if covered["total"] else 1.0
        lines.append(f"coverage {share:.1%} of {count_text(covered['total'])} matrix parameters")
    return _text("\n".join(lines))


def _sites(report: Report, most: int | None) -> list[Any]:
    if not report.rows:
        return []
    columns = [("site", "left"), ("form", "left"), ("shape", "right"), ("bytes", "right"), ("FLOPs", "right")]
    columns += [("predicted", "right"), ("measured", "right"), ("kernel", "left")]
    shown = report.rows
    if most is not None and len(shown) > most:
        worst = sorted(shown, key=lambda r: r.predicted_error, reverse=True)[:most]
        shown = [r for r in shown if r in worst]
    hidden = len(report.rows) - len(shown)
    title = f"Rewritten (the {len(shown)} least accurate of {len(report.rows)})" if hidden else "Rewritten"
    table = _table(title, columns)
    for row in shown:
        table.add_row(
            _text(row.name),
            _text(row.form),
            f"{row.shape[0]}×{row.shape[1]}",
            f"{bytes_text(row.bytes_before)} → {bytes_text(row.bytes_after)}",
            f"{count_text(row.flops_before)} → {count_text(row.flops_after)}",
            error_text(row.predicted_error),
            error_text(row.measured_error),
            _text(row.kernel),
        )
    return [table]


def _skipped(report: Report) -> list[Any]:
    if not report.skipped:
        return []
    table = _table("Left dense", [("site", "left"), ("reason", "left")])
    for skip in report.skipped:
        table.add_row(_text(skip.name), _text(skip.reason))
    return [table]


def _misses(report: Report) -> list[Any]:
    misses = report.coverage.get("misses", [])
    if not misses:
        return []
    table = _table("Not matched", [("name", "left"), ("kind", "left"), ("parameters", "right"), ("reason", "left")])
    for miss in misses:
        table.add_row(
            _text(miss["name"]), _text(miss.get("kind", "")), count_text(miss["parameters"]), _text(miss["reason"])
        )
    return [table]


def _notes(report: Report) -> list[Any]:
    return [_text(f"note: {note}", "yellow") for note in report.notes]


def comparison_table(
    rows: Sequence[Mapping[str, Any]], title: str = "Side by side", *, per_target: bool = False
) -> Any:
    """Rows of `recast compare` and `recast demo` as a table: size, time and fidelity beside the first row.

    Parameters
    ----------
    rows
        ``name, target, bytes, milliseconds, fidelity``; ``coverage`` (a share) and ``error`` (why there are no figures)
        may be there.
    title
        Heading.
    per_target
        Compare each row with the first of the same target, not with the first of all.
    """
    from rich.console import Group

    columns = [
        ("model", "left"),
        ("target", "left"),
        ("size", "right"),
        ("smaller", "right"),
        ("time a batch", "right"),
    ]
    columns += [("faster", "right"), ("mean cosine", "right"), ("worst cosine", "right"), ("rel. error", "right")]
    covered = any(row.get("coverage") is not None for row in rows)
    columns += [("coverage", "right")] if covered else []
    table = _table(title, columns)
    failures = []
    several = [row for row in rows if len(row.get("outputs") or ()) > 1]
    if several:
        places = ", ".join(f"{row['fidelity']['output']} of {row['name']}" for row in several)
        failures.append(_text(f"of several outputs the one with the largest error is shown: {places}", "dim"))
    for row in rows:
        if row.get("error"):
            failures.append(_text(f"{row['name']} ({row['target']}): {row['error']}", "yellow"))
            continue
        first = baseline(rows, row, per_target=per_target)
        figures = row.get("fidelity") or {}
        size, time = row.get("bytes"), row.get("milliseconds")
        cells = [
            _text(row["name"]),
            _text(row["target"]),
            bytes_text(size) if size else "–",
            times_text(first["bytes"], size) if size and first.get("bytes") else "–",
            milliseconds_text(time),
            times_text(first["milliseconds"], time) if time and first.get("milliseconds") else "–",
            _cosine(figures.get("mean_cosine")),
            _cosine(figures.get("worst_cosine")),
            error_text(figures.get("relative_error")),
        ]
        if covered:
            cells.append("–" if row.get("coverage") is None else f"{row['coverage']:.1%}")
        table.add_row(*cells)
    return Group(table, *failures)


def baseline(rows: Sequence[Mapping[str, Any]], row: Mapping[str, Any], *, per_target: bool) -> Mapping[str, Any]:
    """The row that another is compared with: the first without an error, of the same target if asked."""
    usable = [r for r in rows if not r.get("error") and (not per_target or r["target"] == row["target"])]
    return usable[0] if usable else {}


def _cosine(value: float | None) -> str:
    return "–" if value is None else f"{value:.5f}"
