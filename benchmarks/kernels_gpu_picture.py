"""Pictures of `benchmarks.kernels_gpu`: times the speed of the dense product over the number of tokens, a panel for each layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from benchmarks.fidelity_picture import COLOURS
from benchmarks.kernels_gpu_marks import DENSE, speed

Row = Mapping[str, Any]
WIDTH, HEIGHT, LEFT, TOP, BOTTOM, HEAD, LEGEND = 420, 320, 48, 40, 40, 62, 290
TICKS = (0.125, 0.25, 0.5, 1, 2, 4, 8, 16)
STYLE = 'font-family="system-ui, sans-serif" font-size="12" fill="#222" role="img" aria-label="speed over tokens for forms of weights"'
CAPTION = (
    f"up: times the speed of {DENSE} in bfloat16, the faster of eager and tuned; across: tokens; dashed: PyTorch's own"
)


def draw(rows: Sequence[Row], family: str) -> str:
    """The rows of a family that were measured and right, as one SVG; two panels beside each other, names at the right."""
    good = [r for r in rows if r["family"] == family and "ratio" in r and not r.get("wrong")]
    names, layers = list(dict.fromkeys(r["name"] for r in good)), list(dict.fromkeys(r["layer"] for r in good))
    points = {(r["layer"], r["name"], r["tokens"]): value for r in good if (value := speed(rows, r, DENSE)) is not None}
    low, high = min([0.5, *points.values()]), max([2.0, *points.values()])
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    peers = {r["name"] for r in good if r["peer"]}
    across = min(2, len(layers))
    width, height = across * WIDTH + LEGEND, HEAD + max(-(-len(layers) // across) * HEIGHT, 20 * len(names) + 20)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" {STYLE}>',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        f'<text x="16" y="26" font-size="16" font-weight="600">Products with weights, by form: {escape(family)}</text>',
        f'<text x="16" y="48" fill="#555">{escape(CAPTION)}</text>',
    ]
    for i, layer in enumerate(layers):
        here = {(name, tokens): value for (where, name, tokens), value in points.items() if where == layer}
        panel = _panel(layer, here, colours, peers, (low, high))
        parts.append(f'<g transform="translate({i % across * WIDTH} {HEAD + i // across * HEIGHT})">{panel}</g>')
    for i, name in enumerate(names):
        y = HEAD + 20 + 20 * i
        parts.append(
            f'<path d="M{across * WIDTH + 12} {y}h24" stroke="{colours[name]}" stroke-width="2"{_dash(name in peers)}/>'
        )
        parts.append(f'<text x="{across * WIDTH + 44}" y="{y + 4}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _dash(peer: bool) -> str:
    return ' stroke-dasharray="5 3"' if peer else ""


def _panel(
    layer: str,
    points: Mapping[tuple[str, int], float],
    colours: Mapping[str, str],
    peers: set[str],
    limits: tuple[float, float],
) -> str:
    """One layer; both axes count by factors."""
    counts = sorted({tokens for _, tokens in points})
    right, floor = WIDTH - 16, HEIGHT - BOTTOM
    low, high = (math.log(limits[0] * 0.9), math.log(limits[1] * 1.1))

    def x(tokens: int) -> float:
        return LEFT + (counts.index(tokens) + 0.5) / len(counts) * (right - LEFT)

    def y(value: float) -> float:
        return TOP + (high - math.log(value)) / (high - low) * (floor - TOP)

    parts = [f'<text x="{LEFT}" y="{TOP - 12}" font-size="14" font-weight="600">{escape(layer)}</text>']
    for tick in TICKS:
        if low <= math.log(tick) <= high:
            dark = "#888" if tick == 1 else "#eee"
            parts.append(f'<path d="M{LEFT} {y(tick):.1f}H{right}" stroke="{dark}"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}x</text>')
    for tokens in counts:
        parts.append(f'<text x="{x(tokens):.1f}" y="{floor + 16}" text-anchor="middle">{tokens}</text>')
    for name, colour in colours.items():
        line = [(x(tokens), y(points[name, tokens]), tokens) for tokens in counts if (name, tokens) in points]
        if len(line) > 1:
            path = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b, _ in line)
            parts.append(f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.8"{_dash(name in peers)}/>')
        for a, b, tokens in line:
            tip = f"<title>{escape(name)}, {tokens} tokens: {points[name, tokens]:.2f}x</title>"
            parts.append(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3.2" fill="{colour}">{tip}</circle>')
    return "".join(parts)
