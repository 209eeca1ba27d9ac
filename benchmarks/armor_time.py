"""How far ARMOR's searches come in minutes on a weight of 4096 x 4096, at the paper's blocks of 128.

    python -m benchmarks.armor_time --json FILE [--minutes 10] [--size 4096] [--searches alternating,adam@1e-3] [--threads 2]

Given are the share of the first loss, NoWag-P's, that is left, and when 90 % of the gain was reached: of the gain of this run,
where the search ended by itself. Weight and inputs are those of `benchmarks.fit_time`: a random matrix, and few directions that
carry most of the data. A search is named as the form's parameter names it, with the step size of Adam behind `@`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from recast.passes.forms import Stats
from recast.passes.forms.armor import ArmorForm
from recast.passes.forms.armor_fit import ArmorSearch


def measure(size: int, minutes: float, named: str, console: Console) -> dict[str, Any]:
    """Search for so long, or to its end; the loss as a share of the first, by seconds."""
    torch.manual_seed(0)
    weight = torch.randn(size, size) / size**0.5
    inputs = torch.randn(size // 2, size) * torch.logspace(0, -2, size)
    kind, _, rate = named.partition("@")
    search, _, _ = ArmorForm(search=kind, rate=float(rate or 1e-4)).begun(weight, Stats.from_inputs(inputs))
    first, curve = search.loss(), list[dict[str, float]]()
    start = shown = time.perf_counter()
    spent = 0.0
    while spent < 60 * minutes and not search.ended:
        search.advance()
        spent = time.perf_counter() - start
        if time.perf_counter() - shown > 5:
            curve.append(_point(search, spent, first))
            console.log(
                f"{named}: {len(search.losses)} steps, {spent:.0f} s, {curve[-1]['left']:.1%} of the loss is left"
            )
            shown = time.perf_counter()
    curve.append(_point(search, spent, first) | {"left": round(search.loss() / first, 5)})
    wanted = 1 - 0.9 * (1 - curve[-1]["left"])
    reached = next(point["seconds"] for point in curve if point["left"] <= wanted)
    return {
        "search": named, "ended": search.ended, "steps": len(search.losses), "seconds": round(spent, 1),
        "left": curve[-1]["left"], "seconds to 90 % of this": reached, "curve": curve,
    }  # fmt: skip


def _point(search: ArmorSearch, spent: float, first: float) -> dict[str, float]:
    return {"seconds": round(spent, 1), "steps": len(search.losses), "left": round(search.losses[-1] / first, 5)}


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the curves there")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--searches", default="alternating,adam,adam@1e-3", help="the paper's is adam, at 1e-4")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rows = [measure(given.size, given.minutes, name, Console(stderr=True)) for name in given.searches.split(",")]
    table = Table(title=f"armor_time: {given.size} x {given.size}, {given.minutes:g} minutes", title_justify="left")
    for heading in ("search", "steps", "seconds", "loss left", "90 % of its gain after"):
        table.add_column(heading, justify="right")
    for row in rows:
        told = f"{row['seconds to 90 % of this']:g} s" + ("" if row["ended"] else " (not at its end)")
        table.add_row(row["search"], str(row["steps"]), f"{row['seconds']:g}", f"{row['left']:.2%}", told)
    Console(width=None if os.isatty(1) else 120).print(table)
    if given.json is not None:
        from benchmarks.harness import machine_facts

        about = {"benchmark": "armor_time", "size": given.size, "minutes": given.minutes, "threads": given.threads}
        given.json.write_text(json.dumps(about | {"machine": machine_facts(), "rows": rows}, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
