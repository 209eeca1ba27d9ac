"""What `benchmarks.kernels_gpu` measures, in which order, and what it is held to."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recast.kernels.timed import BenchCase

Row = Mapping[str, Any]
DENSE, TUNED, STACK = "F.linear", "F.linear, max-autotune", "decode stack, int4 g128"
# Outputs and inputs of layers of Llama-3-8B and 70B; 117 to 940 MB in 16 bits, more than an L2 holds.
LAYERS = {
    "8B gate+up": (28672, 4096),
    "70B gate+up": (57344, 8192),
    "8B down": (4096, 14336),
    "70B down": (8192, 28672),
    "70B qkv": (10240, 8192),
}
TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
QUICK_LAYERS, QUICK_TOKENS = {"small": (64, 128)}, (1, 16)
ROOFLINE = 0.8


@dataclass(frozen=True)
class Mark:
    """What a form is held to, on each of the layers.

    Parameters
    ----------
    name, form
        Of the mark; of the rows.
    tokens
        Of the rows; none for every number.
    at_least
        Times the speed of `against`.
    against
        Another form, or the faster of both dense products.
    """

    name: str
    form: str
    tokens: int | None
    at_least: float
    against: str = DENSE


MARKS = (
    Mark("int4 g128, 1 token", "int4 g128", 1, 2.9),
    Mark("int4 g128, 16 tokens", "int4 g128", 16, 2.5),
    Mark("int8, weights alone, 1 token", "int8", 1, 1.8),
    Mark("fp8, weights alone, 1 token", "fp8", 1, 1.8),
    Mark("fp8 x fp8, 4096 tokens", "fp8 x fp8", 4096, 1.5),
    Mark("2:4, 1 token", "2:4", 1, 1.6),
    Mark("2:4, 4096 tokens", "2:4", 4096, 1.45),
    Mark("ARMOR, blocks of 128, 1 token", "ARMOR 128", 1, 1.45),
    Mark("low rank at 32 %, 1 token", "low rank 32 %", 1, 2.65),
    Mark("low rank at 32 %, 4096 tokens", "low rank 32 %", 4096, 2.5),
    Mark("Monarch, 4096 tokens", "Monarch, 4 blocks, 32 %", 4096, 2.0),
    Mark("BlockDense, 4096 tokens", "BlockDense, 4 blocks, 33 %", 4096, 2.0),
    # At most 8 % slower.
    Mark("int4 g128 + rank 64 beside int4 g128, 1 token", "int4 g128 + rank 64", 1, 1 / 1.08, "int4 g128"),
    Mark("32 layers in int4, 1 token", STACK, 1, 2.2),
    Mark("int4 g128, any number of tokens", "int4 g128", None, 1.0),
)


@dataclass(frozen=True)
class Group:
    """What is timed side by side: forms at one layer and number of tokens."""

    layer: str
    tokens: int
    names: tuple[str, ...]

    def title(self, name: str) -> str:
        """What `--only` looks at.

        Examples
        --------
        >>> Group("8B down", 1, ()).title("int8")
        '8B down, 1 tokens, int8'
        """
        return f"{self.layer}, {self.tokens} tokens, {name}"


def plan(cases: Sequence[BenchCase], layers: Mapping[str, tuple[int, int]], tokens: Sequence[int]) -> Iterator[Group]:
    """Everything in the order of its weight: marks at one number of tokens, the stack, marks at any, all other forms."""
    there = {case.name: case for case in cases if case.timed}
    told = set[tuple[str, int, str]]()

    def group(layer: str, count: int, names: Sequence[str]) -> Iterator[Group]:
        fits = [
            n
            for n in dict.fromkeys(names)
            if n not in there or there[n].tokens[0] <= count <= there[n].tokens[1]
            if (layer, count, n) not in told
        ]
        told.update((layer, count, n) for n in fits)
        if fits:
            yield Group(layer, count, tuple(fits))

    def with_peers(names: Sequence[str]) -> list[str]:
        ours = [n for n in names if n in there]
        return ours + [p for n in ours for p in there[n].against]

    for i, layer in enumerate(layers):
        for count in tokens:
            held = [name for m in MARKS if m.tokens == count for name in (m.form, m.against) if name in there]
            if held:
                yield from group(layer, count, [DENSE, TUNED, *with_peers(held)])
        if i == 0:
            yield Group("32 layers", 1, (STACK,))
    for layer in layers:
        for count in tokens:
            yield from group(layer, count, [DENSE, *with_peers([m.form for m in MARKS if m.tokens is None])])
    for layer in layers:
        for count in tokens:
            yield from group(layer, count, [DENSE, *there])
    for layer in layers:
        for count in tokens:
            yield from group(layer, count, [TUNED])


def speed(rows: Sequence[Row], row: Row, against: str) -> float | None:
    """How many times faster a row is than another form of its layer and tokens; than the faster dense product for `DENSE`."""
    if row["name"] == STACK:
        return float(row["speed"])
    same = {r["name"]: r for r in rows if r["layer"] == row["layer"] and r["tokens"] == row["tokens"] and "ratio" in r}
    found = [same[name]["ratio"] for name in ((DENSE, TUNED) if against == DENSE else (against,)) if name in same]
    return min(found) / row["ratio"] if found and "ratio" in row else None


def held(
    rows: Sequence[Row], layers: Mapping[str, Any], tokens: Sequence[int], forms: Sequence[str]
) -> list[dict[str, Any]]:
    """Each mark with what was measured, the worst of all layers, and each form's share of the least time, the best of all rows.

    `met` is None until every layer was measured, unless one has failed.
    """
    found = []
    for mark in MARKS:
        asked = 1 if mark.form == STACK else len(layers) * (len(tokens) if mark.tokens is None else 1)
        speeds = {
            (row["layer"], row["tokens"]): value
            for row in rows
            if row["name"] == mark.form and mark.tokens in (None, row["tokens"]) and not row.get("wrong")
            if (value := speed(rows, row, mark.against)) is not None
        }
        entry: dict[str, Any] = {"mark": mark.name, "measured": None, "at least": round(mark.at_least, 3), "met": None}
        entry |= {"against": mark.against, "rows": len(speeds), "of": asked}
        if speeds:
            where = min(speeds, key=lambda key: speeds[key])
            entry["measured"] = float(f"{speeds[where]:.4g}")
            entry["median"] = float(f"{statistics.median(speeds.values()):.4g}")
            entry["where"] = f"{where[0]}, {where[1]} tokens"
            entry["met"] = False if speeds[where] < mark.at_least else True if len(speeds) >= asked else None
        found.append(entry)
    for form in forms:
        shares = {(r["layer"], r["tokens"]): r["share"] for r in rows if r["name"] == form and r.get("share")}
        entry = {
            "mark": f"{form}: share of the least time, at best",
            "measured": None,
            "at least": ROOFLINE,
            "met": None,
        }
        entry |= {"against": "roofline", "rows": len(shares), "of": 1}
        if shares:
            where = max(shares, key=lambda key: shares[key])
            entry |= {"measured": float(f"{shares[where]:.4g}"), "where": f"{where[0]}, {where[1]} tokens"}
            entry["met"] = (
                True if shares[where] >= ROOFLINE else None if len(shares) < len(layers) * len(tokens) else False
            )
        found.append(entry)
    return found
