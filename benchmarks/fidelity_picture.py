"""The picture of `benchmarks.fidelity`: perplexity over bytes, one line a form, a panel for each kind of form."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

Row = Mapping[str, Any]
Point = tuple[float, float]  # share of the bytes at 16 bits, perplexity
PANELS = ("low rank", "structured", "sparse", "quantized")
WORST = 12.0  # times the dense perplexity: what is above leaves the panel
SHARES = (0.09, 1.05)
TICKS = (0.1, 0.125, 0.25, 0.375, 0.5, 0.75, 1.0)
# Nine colours that differ in lightness, too; then the same again, dashed.
COLOURS = ("#1b6ca8", "#d1495b", "#2e8b57", "#e08e0b", "#7b4fa3", "#008b9a", "#a0522d", "#d16ba5", "#5b6770")
HEAD = 62
CAPTION = "across: share of the bytes at 16 bits a value; dashed: the dense model; grey: the best of all forms; ^: has points above"
STYLE = (
    'font-family="system-ui, sans-serif" font-size="12" fill="#222" role="img" '
    'aria-label="perplexity over bytes for every weight form"'
)
WIDTH, HEIGHT, LEFT, TOP, BOTTOM, LEGEND = 640, 400, 52, 34, 40, 210


def draw(rows: Sequence[Row]) -> str:
    """The rows of one language model as one SVG."""
    good = [
        row for row in rows if "perplexity" in row and row.get("scope", "all") == "all" and row["kind"] != "activations"
    ]
    dense = next(float(row["perplexity"]) for row in good if row["form"] == "dense")
    best = frontier((float(row["share"]), float(row["perplexity"])) for row in good if row["form"] != "dense")
    width, height = 2 * WIDTH, 2 * HEIGHT + HEAD
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" {STYLE}>',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        '<text x="16" y="26" font-size="16" font-weight="600">Held-out perplexity over bytes of the rewritten matrices</text>',
        f'<text x="16" y="48" fill="#555">{CAPTION}</text>',
    ]
    for i, kind in enumerate(PANELS):
        lines = lines_of(row for row in good if row["kind"] == kind)
        panel = _panel(kind, lines, dense, best, i)
        parts.append(f'<g transform="translate({i % 2 * WIDTH} {HEAD + i // 2 * HEIGHT})">{panel}</g>')
    return "\n".join([*parts, "</svg>", ""])


def lines_of(rows: Iterable[Row]) -> dict[str, list[Point]]:
    """Points of each form from few bytes to many, forms in the order of how well they do."""
    found: dict[str, list[Point]] = {}
    for row in rows:
        found.setdefault(line_of(row["form"]), []).append((float(row["share"]), float(row["perplexity"])))

    def score(points: list[Point]) -> float:
        # Bytes count as much as logarithms of perplexity do: nobody is first for having tried large sizes only.
        return sum(math.log(y) + math.log(x) for x, y in points) / len(points)

    ordered = sorted(found.items(), key=lambda item: score(item[1]))
    return {name: sorted(points) for name, points in ordered}


def line_of(form: str) -> str:
    """The line that a form is on: a method of rounding is one for all of its bits.

    Examples
    --------
    >>> line_of("int3, groups of 32 gptq"), line_of("lorc int2"), line_of("nf3(double=true)"), line_of("int8")
    ('int gptq', 'lorc', 'nf', 'int8')
    """
    form = re.sub(r"^int[234](, groups of \d+)? ", "int ", form)
    return re.sub(r"^(lorc|lq|nf).*?(| gptq)$", r"\1\2", form)


def frontier(points: Iterable[Point]) -> list[Point]:
    """Points that no other point beats in both, from few bytes to many.

    Examples
    --------
    >>> frontier([(0.5, 3.0), (0.25, 4.0), (0.4, 5.0), (0.6, 3.0)])
    [(0.25, 4.0), (0.5, 3.0)]
    """
    found: list[Point] = []
    for x, y in sorted(points):
        if not found or y < found[-1][1]:
            found.append((x, y))
    return found


def _panel(kind: str, lines: Mapping[str, list[Point]], dense: float, best: Sequence[Point], number: int) -> str:
    right, floor = WIDTH - LEGEND, HEIGHT - BOTTOM
    low, high = math.log(dense * 0.97), math.log(dense * WORST)

    def across(share: float) -> float:
        a, b = (math.log(value) for value in SHARES)
        return LEFT + (math.log(share) - a) / (b - a) * (right - LEFT)

    def up(perplexity: float) -> float:
        return TOP + (high - math.log(perplexity)) / (high - low) * (floor - TOP)

    def path(points: Sequence[Point]) -> str:
        return "M" + "L".join(f"{across(x):.1f} {up(min(y, dense * 1e4)):.1f}" for x, y in points)

    parts = [
        f'<clipPath id="panel{number}"><rect x="{LEFT}" y="{TOP}" width="{right - LEFT}" height="{floor - TOP}"/></clipPath>',
        f'<text x="{LEFT}" y="{TOP - 10}" font-size="14" font-weight="600">{escape(kind)}</text>',
    ]
    for share in TICKS:
        x = across(share)
        parts.append(f'<path d="M{x:.1f} {TOP}V{floor}" stroke="#eee"/>')
        if share != 0.1:
            parts.append(f'<text x="{x:.1f}" y="{floor + 16}" text-anchor="middle">{share * 100:g} %</text>')
    for factor in (1, 1.5, 2, 3, 5, 8, 12):
        y = up(dense * factor)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{right}" stroke="#eee"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{dense * factor:.0f}</text>')
    inside = (
        [f'<path d="{path(best)}" fill="none" stroke="#ccc" stroke-width="6" stroke-linejoin="round"/>'] if best else []
    )
    inside.append(f'<path d="M{LEFT} {up(dense):.1f}H{right}" stroke="#222" stroke-dasharray="4 4"/>')
    for i, (name, points) in enumerate(lines.items()):
        colour, dash = COLOURS[i % len(COLOURS)], ' stroke-dasharray="5 3"' if i >= len(COLOURS) else ""
        if len(points) > 1:
            inside.append(f'<path d="{path(points)}" fill="none" stroke="{colour}" stroke-width="1.8"{dash}/>')
        for x, y in points:
            tip = f"<title>{escape(name)}: {x:.1%} of the bytes, perplexity {y:.4g}</title>"
            inside.append(
                f'<circle cx="{across(x):.1f}" cy="{up(min(y, dense * 1e4)):.1f}" r="3.4" fill="{colour}">{tip}</circle>'
            )
        row = TOP + 8 + i * min(17, (floor - TOP) / max(1, len(lines)))
        sample = (
            f'<path d="M{right + 12} {row:.1f}h18" stroke="{colour}" stroke-width="1.8"{dash}/>'
            if len(points) > 1
            else ""
        )
        parts.append(sample + f'<circle cx="{right + 21}" cy="{row:.1f}" r="3.4" fill="{colour}"/>')
        parts.append(
            f'<text x="{right + 36}" y="{row + 4:.1f}" font-size="11">{escape(name)}{_beyond(points, dense)}</text>'
        )
    return "".join([*parts, f'<g clip-path="url(#panel{number})">', *inside, "</g>"])


def _beyond(points: Sequence[Point], dense: float) -> str:
    """Mark a form that has points which the panel does not show."""
    return " ^" if any(y > dense * WORST for _, y in points) else ""
