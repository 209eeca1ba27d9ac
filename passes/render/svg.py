"""Small plots as SVG: colours come from the page's style sheet, so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

__all__ = ["scatter", "spectrum"]

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 420, 320, 56, 44
_TOP = 10


def scatter(points: Sequence[tuple[float, float, str]], across: str, up: str) -> str:
    """Log-log scatter with the diagonal; a point is ``(x, y, tooltip)``. Empty where no point is positive.

    Examples
    --------
    >>> scatter([(0.1, 0.12, "a"), (0.01, 0.01, "b")], "predicted", "measured").count("<circle")
    2
    """
    points = [p for p in points if p[0] > 0 and p[1] > 0 and math.isfinite(p[0] * p[1])]
    if not points:
        return ""
    values = [v for p in points for v in p[:2]]
    low, high = math.log10(min(values)), math.log10(max(values))
    middle = (low + high) / 2
    span = max(high - low, 0.6) * 1.15  # a cloud of equal values still gets a scale to stand on
    low, high = middle - span / 2, middle + span / 2

    def place(x: float, y: float) -> tuple[float, float]:
        right = _LEFT + (math.log10(x) - low) / (high - low) * (_WIDTH - _LEFT - 12)
        return right, _TOP + (high - math.log10(y)) / (high - low) * (_HEIGHT - _BOTTOM - _TOP)

    label = f"{escape(up)} against {escape(across)}"
    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" class="plot" role="img" aria-label="{label}">']
    for tick in _ticks(low, high):
        x, y = place(tick, tick)
        parts.append(f'<path class="grid" d="M{x:.1f} {_TOP}V{_HEIGHT - _BOTTOM}M{_LEFT} {y:.1f}H{_WIDTH - 12}"/>')
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{_percent(tick)}</text>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_percent(tick)}</text>')
    (x0, y0), (x1, y1) = place(10**low, 10**low), place(10**high, 10**high)
    parts.append(f'<path class="diagonal" d="M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}"/>')
    for x, y, tip in points:
        right, down = place(x, y)
        parts.append(
            f'<circle class="dot" cx="{right:.1f}" cy="{down:.1f}" r="4.5"><title>{escape(tip)}</title></circle>'
        )
    parts.append(
        f'<text class="axis" x="{(_WIDTH + _LEFT) / 2}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(across)}</text>'
    )
    parts.append(
        f'<text class="axis" transform="translate(12 {(_HEIGHT - _BOTTOM) / 2}) rotate(-90)" text-anchor="middle">'
        f"{escape(up)}</text></svg>"
    )
    return "".join(parts)


def _ticks(low: float, high: float) -> list[float]:
    """Round values between two powers of ten: 1-2-5 where there is room for few decades only, else decades."""
    decades = range(math.floor(low), math.ceil(high) + 1)
    for steps in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)):
        found = [s * 10.0**d for d in decades for s in steps if low <= math.log10(s * 10.0**d) <= high]
        if len(found) >= 3:
            break
    return found[:: max(1, math.ceil(len(found) / 7))]


def _percent(value: float) -> str:
    text = f"{value * 100:.6f}".rstrip("0").rstrip(".")
    return f"{text} %" if value >= 1e-5 else f"{value:.0e}"


def spectrum(values: Sequence[float], name: str) -> str:
    """Singular values, largest first and relative to it, on a logarithmic scale over four decades.

    Examples
    --------
    >>> "<path" in spectrum([1.0, 0.5, 0.01], "query")
    True
    """
    width, height, left, bottom, floor = 200, 110, 34, 8, -4.0
    span = max(1, len(values) - 1)

    def place(index: int, value: float) -> tuple[float, float]:
        depth = max(floor, math.log10(value)) if value > 0 else floor
        return left + index / span * (width - left - 4), 6 + depth / floor * (height - bottom - 6)

    label = f"singular values of {escape(name)}"
    parts = [f'<svg viewBox="0 0 {width} {height}" class="plot small" role="img" aria-label="{label}">']
    for power in (0, -2, -4):
        y = place(0, 10.0**power)[1]
        label = {0: "1", -2: "10⁻²", -4: "10⁻⁴"}[power]
        parts.append(
            f'<path class="grid" d="M{left} {y:.1f}H{width - 4}"/>'
            f'<text x="{left - 4}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
        )
    line = "L".join(f"{x:.1f} {y:.1f}" for x, y in (place(i, v) for i, v in enumerate(values)))
    base = place(0, 0.0)[1]
    parts.append(
        f'<path class="area" d="M{left} {base:.1f}L{line}L{width - 4} {base:.1f}Z"/>'
        f'<path class="line" d="M{line}"/></svg>'
    )
    return "".join(parts)
