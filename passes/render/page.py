"""Reports as one HTML page that needs nothing else: styles and pictures are inside, there is no script."""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from recast.passes.render.svg import scatter, spectrum
from recast.passes.render.table import baseline
from recast.passes.render.words import bytes_text, change_text, count_text, error_text, milliseconds_text, times_text

if TYPE_CHECKING:
    from jinja2 import Template

    from recast.passes.report import Report, SiteRow

__all__ = ["page"]


def page(
    report: Report | Mapping[str, Report],
    *,
    title: str | None = None,
    rows: Sequence[Mapping[str, Any]] | None = None,
    per_target: bool = False,
    remark: str = "",
) -> str:
    """One self-contained HTML page.

    Parameters
    ----------
    report
        What happened; or several reports by name, each of which gets a section.
    title
        Heading; by default the model's label.
    rows
        Comparison rows (``name, target, bytes, milliseconds, fidelity``), shown as bars and a table.
    per_target
        Compare each row with the first of the same target, not with the first of all.
    remark
        A sentence above the comparison.

    Returns
    -------
    str
        HTML5. Names are escaped; nothing is loaded from elsewhere.
    """
    reports = dict(report) if isinstance(report, Mapping) else {"": report}
    first = next(iter(reports.values()), None)
    heading = title or (first.model if first else "recast")
    return _template().render(
        title=heading,
        remark=remark,
        sections=[_section(name, r) for name, r in reports.items()],
        comparison=_comparison(list(rows or []), per_target) if rows else None,
        coverage=_coverage(first) if first else None,
        notes=list(dict.fromkeys(note for r in reports.values() for note in r.notes)),
    )


@functools.cache
def _template() -> Template:
    from jinja2 import Environment, StrictUndefined

    here = importlib.resources.files("recast.passes.render")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals["style"] = (here / "page.css").read_text(encoding="utf-8")
    environment.filters.update(
        bytes=bytes_text, count=count_text, error=error_text, milliseconds=milliseconds_text, breakable=_breakable
    )
    return environment.from_string((here / "page.html.j2").read_text(encoding="utf-8"))


def _breakable(name: str) -> Any:
    """A dotted name that may be broken after its dots; prose stays as it is."""
    from markupsafe import Markup, escape

    text = str(escape(name))
    return Markup(text if " " in text else text.replace(".", ".<wbr>"))


@dataclasses.dataclass(frozen=True)
class Bar:
    """A bar of a chart: a share of the longest, the figure as text, and what it belongs to."""

    name: str
    target: str
    share: float
    text: str
    note: str


def _comparison(rows: list[Mapping[str, Any]], per_target: bool) -> dict[str, Any]:
    usable = [r for r in rows if not r.get("error")]
    table = []
    for row in rows:
        first = baseline(rows, row, per_target=per_target)
        figures = row.get("fidelity") or {}
        table.append(
            {
                "name": row["name"],
                "target": row["target"],
                "error": row.get("error"),
                "bytes": row.get("bytes"),
                "smaller": _against(first, row, "bytes"),
                "milliseconds": row.get("milliseconds"),
                "faster": _against(first, row, "milliseconds"),
                "mean_cosine": _cosine(figures.get("mean_cosine")),
                "worst_cosine": _cosine(figures.get("worst_cosine")),
                "relative_error": figures.get("relative_error"),
                "coverage": None if row.get("coverage") is None else f"{row['coverage']:.1%}",
            }
        )
    targets = list(dict.fromkeys(str(r["target"]) for r in usable))
    return {
        "table": table,
        "covered": any(row["coverage"] for row in table),
        "targets": {target: i % 4 for i, target in enumerate(targets)},
        "sizes": _bars(usable, rows, "bytes", bytes_text, "smaller", per_target),
        "times": _bars(usable, rows, "milliseconds", milliseconds_text, "faster", per_target),
    }


def _bars(
    usable: list[Mapping[str, Any]], rows: list[Mapping[str, Any]], key: str, text: Any, word: str, per_target: bool
) -> list[Bar]:
    longest = max((r[key] for r in usable if r.get(key)), default=0)
    bars = []
    for row in usable:
        if not row.get(key):
            continue
        first = baseline(rows, row, per_target=per_target)
        note = "" if first is row else f"{_against(first, row, key)} {word}"
        bars.append(Bar(str(row["name"]), str(row["target"]), row[key] / longest, text(row[key]), note))
    return bars


def _against(first: Mapping[str, Any], row: Mapping[str, Any], key: str) -> str:
    return times_text(first[key], row[key]) if first.get(key) and row.get(key) else "–"


def _cosine(value: float | None) -> str:
    return "–" if value is None else f"{value:.5f}"


def _section(name: str, report: Report) -> dict[str, Any]:
    measured = [r for r in report.rows if r.measured_error is not None]
    return {
        "name": name,
        "report": report,
        "tiles": _tiles(report),
        "map": _map(report),
        "legend": _legend(report.rows),
        "on_data": bool(measured),
        "scatter": scatter([_dot(r) for r in measured], "predicted error", "measured error"),
        "spectra": [(r, spectrum(r.spectrum, r.name)) for r in _worth_a_picture(report.rows)],
        "passes": [(n, _pass(figures)) for n, figures in report.passes.items()],
    }


def _dot(row: SiteRow) -> tuple[float, float, str]:
    predicted, measured = error_text(row.predicted_error), error_text(row.measured_error)
    return row.predicted_error, row.measured_error or 0.0, f"{row.name}: predicted {predicted}, measured {measured}"


def _tiles(report: Report) -> list[tuple[str, str, str]]:
    """Headline figures: label, figure, remark."""
    before, after = report.bytes_before, report.bytes_after
    size = f"{bytes_text(before)} before, {change_text(before, after)}"
    tiles = [("weights", bytes_text(after), size)]
    flops = report.flops
    if flops[0]:
        tiles.append(("FLOPs a token", count_text(flops[1]), f"{count_text(flops[0])} before, at rewritten sites"))
    outputs = [(n, f) for n, f in report.whole.items() if "relative_error" in f]
    if outputs:
        name, worst = max(outputs, key=lambda item: item[1]["relative_error"])
        tiles.append(("whole model", error_text(worst["relative_error"]), f"relative error of {name}"))
        if "mean_cosine" in worst:
            tiles.append(("mean cosine", f"{worst['mean_cosine']:.5f}", f"worst {worst['worst_cosine']:.5f}"))
    apart = [f["relative_error"] for f in report.agreement.values() if "relative_error" in f]
    if apart:
        tiles.append((f"{report.target} against eager", error_text(max(apart)), "both rewritten, relative difference"))
    if report.rows:
        row = max(report.rows, key=_error)
        tiles.append(("worst site", error_text(_error(row)), row.name))
    sites = f"{len(report.skipped)} left dense" if report.skipped else "all of them"
    tiles.append(("sites rewritten", str(len(report.rows)), sites))
    return tiles


def _error(row: SiteRow) -> float:
    return row.predicted_error if row.measured_error is None else row.measured_error


def _legend(rows: Sequence[SiteRow]) -> tuple[float, float]:
    """Smallest and largest error, the ends of the colour scale; at least a factor of ten apart."""
    errors = [e for r in rows if (e := _error(r)) > 0 and math.isfinite(e)]
    if not errors:
        return 0.001, 0.01
    low, high = min(errors), max(errors)
    return (low, high) if high >= 3 * low else (low / 1.8, high * 1.8)


def _map(report: Report) -> list[dict[str, Any]]:
    """Rows of blocks in model order, a row for each layer; widths are shares of the widest row."""
    low, high = _legend(report.rows)
    groups: list[dict[str, Any]] = []
    for row in report.rows:
        layer = _layer(row.name)
        if not groups or groups[-1]["name"] != layer:
            groups.append({"name": layer, "blocks": [], "total": 0})
        error = _error(row)
        heat = 0.0 if error <= 0 else (math.log(error) - math.log(low)) / (math.log(high) - math.log(low))
        groups[-1]["blocks"].append(
            {
                "name": row.name.removeprefix(f"{layer}.") if layer else row.name,
                "bytes": row.bytes_after,
                "heat": round(100 * min(1.0, max(0.0, heat))),
                "tip": _tip(row),
            }
        )
        groups[-1]["total"] += row.bytes_after
    widest = max((g["total"] for g in groups), default=1) or 1
    for group in groups:
        group["share"] = 100 * group["total"] / widest
        names = [block["name"] for block in group["blocks"]]
        for block in group["blocks"]:
            block["label"] = _short(block["name"], names) if group["name"] else block["name"]
    return groups


def _tip(row: SiteRow) -> str:
    measured = "measured" if row.measured_error is not None else "of the weight"
    return (
        f"{row.name}\n{row.form}\n"
        f"{row.shape[0]}×{row.shape[1]}, {bytes_text(row.bytes_before)} → {bytes_text(row.bytes_after)}\n"
        f"error {error_text(_error(row))} {measured}, {error_text(row.predicted_error)} predicted"
    )


def _layer(name: str) -> str:
    """The part of a name up to its last number: sites that share it stand in one row.

    Examples
    --------
    >>> _layer("encoder.layer.3.attention.query"), _layer("lm_head"), _layer("0")
    ('encoder.layer.3', '', '')
    """
    pieces = name.split(".")
    numbers = [i for i, piece in enumerate(pieces[:-1]) if piece.isdigit()]
    return ".".join(pieces[: numbers[0] + 1]) if numbers else ""


def _short(name: str, others: Sequence[str]) -> str:
    """The shortest ending of a dotted name that no other name shares.

    Examples
    --------
    >>> _short("self.query", ["self.query", "self.key"]), _short("out.dense", ["mid.dense", "out.dense"])
    ('query', 'out.dense')
    """
    pieces = name.split(".")
    endings = (".".join(pieces[i:]) for i in reversed(range(len(pieces))))
    unique = (e for e in endings if sum(f".{other}".endswith(f".{e}") for other in others) == 1)
    return next(unique, name)


def _worth_a_picture(rows: Sequence[SiteRow], most: int = 6) -> list[SiteRow]:
    """The least accurate and the largest sites that have a spectrum, half of each, in model order."""
    known = [r for r in rows if len(r.spectrum) > 1]
    worst = sorted(known, key=_error, reverse=True)[: most // 2]
    rest = sorted((r for r in known if r not in worst), key=lambda r: r.bytes_before, reverse=True)
    chosen = [*worst, *rest[: most - len(worst)]]
    return [r for r in known if r in chosen]


def _pass(figures: Mapping[str, Any]) -> dict[str, Any]:
    known = {k: v for k, v in figures.items() if k not in ("soundness", "verified", "note")}
    text = [f"{k.replace('_', ' ')} {error_text(v) if isinstance(v, float) else v}" for k, v in known.items()]
    return {
        "soundness": figures.get("soundness", "?"),
        "verified": bool(figures.get("verified")),
        "text": "; ".join([*text, *([str(figures["note"])] if figures.get("note") else [])]),
    }


def _coverage(report: Report) -> dict[str, Any] | None:
    if "parameters" not in report.coverage:
        return None
    found = dict(report.coverage)
    shares = {}
    for what in ("parameters", "flops"):
        total, matched = found[what]["total"], found[what]["matched"]
        shares[what] = (matched / total if total else 1.0, matched, total)
    counts = {kind: n for kind, n in found.get("sites", {}).items() if n}
    return {"shares": shares, "counts": counts, "misses": found.get("misses", [])}
